"""Captioned video → latents, annotations and videos in VPP's layout (`Step1_GFDM.data` reads them).

    python -m Step1_GFDM.prepare data=captioned_videos data.root=<folder> vae=<run> output=<folder>

Sources: `Step1_GFDM.sources`. An episode's annotation is written last, and makes the episode count: a killed
run continues with `resume=true`. Processes of `accelerate launch` share the episodes. A damaged video is
reported, noted in `skipped/` and left out; `resume=true` tries it again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder
from jaxtyping import Float
from omegaconf import DictConfig
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from defi.config import entry
from defi.engine.checkpoint import MANIFEST as CHECKPOINT
from defi.engine.checkpoint import find_weights
from defi.engine.output import check_output, prepare_output, write_file
from defi.engine.weights import fingerprint
from defi.errors import UserError, writing
from defi.files import read_json
from defi.processes import processes, share
from defi.video import VIDEO_CODEC, prepare_frames, write_mp4
from Step1_GFDM import pipeline
from Step1_GFDM.config import check_counts
from Step1_GFDM.data import LATENTS, MANIFEST, SPLITS
from Step1_GFDM.sources import Recordings, Scene, read_source

SKIPPED = "skipped"
# Pixels a side that an autoencoder alone may ask for: SVD's says 768, and no preset works at that.
LARGEST = 512
Encode = Callable[[Float[Tensor, "F 3 H W"]], Float[Tensor, "F 4 h w"]]


def check_same(file: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError if the folder of a manifest was begun with something else."""
    fix = "choose another output="
    before, now = read_json(file, fix), json.loads(json.dumps(manifest))  # as it comes back from a file
    for settings in (before, now):  # as the command line names them
        settings |= {f"data.{key}": value for key, value in settings.pop("data", {}).items()}
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(f"{file}: begun with {key}={before.get(key)}, now {value}; {fix}")


def load_vae(path: Path) -> tuple[AutoencoderKLTemporalDecoder, Path]:
    """A VAE and its folder: of a run of `Step1_GFDM.train_vae`, of a diffusers pipeline, or `path` itself."""
    folders = [] if (path / CHECKPOINT).is_file() else [path, path / "vae"]
    folder = next((each for each in folders if (each / "config.json").is_file()), None)
    folder = folder or find_weights(path, "vae")
    return pipeline.load_part(AutoencoderKLTemporalDecoder, folder).requires_grad_(False), folder


def write_episode(
    output: Path, split: str, name: str, scene: Scene, *, encode: Encode, image_size: int
) -> None:
    """Latents and videos of all cameras, then the annotation that makes them count."""
    latents = [f"latent_videos/{split}/{name}/{camera}.safetensors" for camera in scene.views]
    videos = [f"videos/{split}/{name}/{camera}.mp4" for camera in scene.views]
    for frames, latent, video in zip(scene.views.values(), latents, videos):
        (output / latent).parent.mkdir(parents=True, exist_ok=True)
        coded = encode(prepare_frames(frames, image_size))
        write_file(output / latent, save({LATENTS: coded.half().contiguous()}))
        write_mp4(output / video, frames, scene.fps)
    annotation = {
        "episode_id": name,
        "texts": scene.texts,
        "videos": [{"video_path": path} for path in videos],
        "latent_videos": [{"latent_video_path": path} for path in latents],
        "video_length": len(frames),
        "fps": scene.fps,
    }
    write_file(output / "annotation" / split / f"{name}.json", json.dumps(annotation))


def write_episodes(output: Path, recordings: Mapping[str, Recordings], encode: Encode, size: int) -> None:
    """This process's share of the episodes that are not there yet, or notes of why they are left out.

    The next recording is read while this one is encoded.
    """

    def read(job: tuple[str, str]) -> Scene | UserError:
        try:
            return recordings[job[0]].read[job[1]]()
        except UserError as error:
            return error

    def read_ahead() -> Iterator[tuple[str, str, Scene | UserError]]:
        with ThreadPoolExecutor(1) as pool:
            scenes = (pool.submit(read, job) for job in jobs)
            following = next(scenes, None)
            for job in jobs:
                scene, following = following.result(), next(scenes, None)
                yield *job, scene

    every = [(split, name) for split, found in recordings.items() for name in found.read]
    jobs = share([(s, n) for s, n in every if not (output / "annotation" / s / f"{n}.json").exists()])
    quiet = not processes().is_local_main_process
    for split, name, scene in track(read_ahead(), "latents", total=len(jobs), disable=quiet):
        note = output / SKIPPED / split / f"{name}.txt"
        with writing(output, f"episode {split}/{name}"):
            if isinstance(scene, UserError):
                print(f"left out: {scene}")
                write_file(note, f"{scene}\n")
            else:
                note.unlink(missing_ok=True)  # before the annotation, after which nothing is done again
                write_episode(output, split, name, scene, encode=encode, image_size=size)


@entry("step1_prepare")
def main(cfg: DictConfig) -> None:
    state = processes()
    output = check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    check_counts(cfg, batch=1, **({} if cfg.image_size is None else {"image_size": 1}))
    source = read_source(cfg.data)
    recordings = {split: source.open(split) for split in SPLITS}
    vae, weights = load_vae(Path(cfg.vae))
    scaling, trained_size = vae.config.scaling_factor, vae.config.sample_size
    if cfg.image_size is None and trained_size > LARGEST:
        raise UserError(
            f"image_size=: {weights} is for pictures of {trained_size} pixels a side; "
            "give that of your video model, image_size=256 for preset=paper"
        )
    manifest = {  # what the latents are made of and with; a resumed run must agree in all of it
        "data": source.identity(),
        "splits": {split: found.fingerprint for split, found in recordings.items()},
        "vae": fingerprint(weights),
        "scaling": scaling,
        "image_size": cfg.image_size or trained_size,
        "cameras": recordings["train"].cameras,
        "latents": "float16 safetensors, posterior's mode × scaling",
        "videos": VIDEO_CODEC,
    }
    if cfg.resume and (output / MANIFEST).is_file():
        check_same(output / MANIFEST, manifest)
    state.wait_for_everyone()  # before the folder changes, all have checked it
    if state.is_main_process:
        prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
        with writing(output, MANIFEST):
            for folder in (f"{kind}/{split}" for kind in ("annotation", SKIPPED) for split in SPLITS):
                (output / folder).mkdir(parents=True, exist_ok=True)
            write_file(output / MANIFEST, json.dumps(manifest, indent=1))
    state.wait_for_everyone()

    vae.to(state.device)

    @torch.inference_mode()
    def encode(frames: Float[Tensor, "F 3 H W"]) -> Float[Tensor, "F 4 h w"]:
        """Scaled latents (mode of the posterior) of frames in [-1, 1]."""
        modes = [vae.encode(some.to(vae.device)).latent_dist.mode() for some in frames.split(cfg.batch)]
        return torch.cat(modes).cpu() * scaling

    write_episodes(output, recordings, encode, manifest["image_size"])
    state.wait_for_everyone()
    for split in SPLITS if state.is_main_process else ():
        count, skipped = (len(list((output / f / split).glob("[!.]*"))) for f in ("annotation", SKIPPED))
        notes = f"see {output / SKIPPED / split}"
        print(
            f"{output}: {count} episodes in {split}" + (f"; {skipped} left out, {notes}" if skipped else "")
        )
        if not count:
            raise UserError(f"{output}: no episode of {split} could be read; {notes}")


if __name__ == "__main__":
    main()
