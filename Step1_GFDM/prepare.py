"""Captioned video → latents, annotations and videos in VPP's layout (`Step1_GFDM.data` reads them).

    python -m Step1_GFDM.prepare data=captioned_videos data.root=<folder> vae=<run> output=<folder>

Sources: `Step1_GFDM.sources`. An episode's annotation is written last, and makes the episode count: a killed
run goes on with `resume=true`. Processes of `accelerate launch` share the episodes. A damaged video is
reported, noted in `skipped/` and left out; `resume=true` tries it again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from Step1_GFDM.sources import read_source
from Step1_GFDM.sources.recordings import Recording, Recordings, Scene

SKIPPED = "skipped"
# Pixels a side that an autoencoder alone may ask for: SVD's says 768, and no preset works at that.
LARGEST = 512
Job = tuple[str, Recording]  # with its split
Encode = Callable[[Float[Tensor, "F 3 H W"]], Float[Tensor, "F 4 h w"]]


def check_same(file: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError if the folder of a manifest was begun with something else."""

    def settings(data: dict[str, Any], **rest: Any) -> dict[str, Any]:  # as the command line names them
        return {f"data.{key}": value for key, value in data.items()} | rest

    fix = "choose another output="
    before = settings(**{"data": {}, **read_json(file, fix)})
    for key, value in settings(**json.loads(json.dumps(manifest))).items():  # as it comes back from a file
        if key not in before:
            raise UserError(f"{file}: does not say {key}=, for it is of an earlier version; {fix}")
        if before[key] != value:
            raise UserError(f"{file}: begun with {key}={before[key]}, now {value}; {fix}")


@torch.inference_mode()
def encode_frames(
    vae: AutoencoderKLTemporalDecoder, batch: int, frames: Float[Tensor, "F 3 H W"]
) -> Float[Tensor, "F 4 h w"]:
    """Scaled latents (mode of the posterior) of frames in [-1, 1], `batch` at a time."""
    modes = [vae.encode(some.to(vae.device)).latent_dist.mode() for some in frames.split(batch)]
    return torch.cat(modes).cpu() * vae.config.scaling_factor


def find_vae(path: Path | str) -> Path:
    """The VAE's folder: of a run of `Step1_GFDM.train_vae`, of a diffusers pipeline, or `path` itself."""
    if not (Path(path) / CHECKPOINT).is_file():
        for folder in (Path(path), Path(path) / "vae"):
            if (folder / "config.json").is_file():
                return folder
    return find_weights(path, "vae")


def write_episode(
    output: Path, split: str, name: str, scene: Scene, *, encode: Encode, image_size: int
) -> None:
    """Latents and videos of all cameras, then the annotation that makes them count."""
    latents, videos = [], []
    for camera, frames in scene.views.items():
        latent = f"latent_videos/{split}/{name}/{camera}.safetensors"
        video = f"videos/{split}/{name}/{camera}.mp4"
        (output / latent).parent.mkdir(parents=True, exist_ok=True)
        coded = encode(prepare_frames(frames, image_size))
        write_file(output / latent, save({LATENTS: coded.half().contiguous()}))
        write_mp4(output / video, frames, scene.fps)
        latents.append({"latent_video_path": latent})
        videos.append({"video_path": video})
    annotation = {
        "episode_id": name,
        "texts": scene.texts,
        "videos": videos,
        "latent_videos": latents,
        "video_length": len(frames),
        "fps": scene.fps,
    }
    write_file(output / "annotation" / split / f"{name}.json", json.dumps(annotation))


def read_ahead(jobs: Sequence[Job]) -> Iterator[tuple[Job, Scene | UserError]]:
    """Scenes in order, or why there is none; the next one is read while this one is used."""

    def read(job: Job) -> Scene | UserError:
        try:
            return job[1].read()
        except UserError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        scenes = (pool.submit(read, job) for job in jobs)
        following = next(scenes, None)
        for job in jobs:
            scene, following = following.result(), next(scenes, None)
            yield job, scene


def write_episodes(output: Path, recordings: Mapping[str, Recordings], encode: Encode, size: int) -> None:
    """This process's share of the episodes that are not there yet, or notes of why they are left out."""
    every = [(split, recording) for split, found in recordings.items() for recording in found.items]
    jobs = share([(s, r) for s, r in every if not (output / "annotation" / s / f"{r.id}.json").exists()])
    quiet = not processes().is_local_main_process
    for (split, recording), scene in track(read_ahead(jobs), "latents", total=len(jobs), disable=quiet):
        note = output / SKIPPED / split / f"{recording.id}.txt"
        with writing(output, f"episode {split}/{recording.id}"):
            if isinstance(scene, UserError):
                print(f"left out: {scene}")
                write_file(note, f"{scene}\n")
            else:
                note.unlink(missing_ok=True)  # before the annotation, after which nothing is done again
                write_episode(output, split, recording.id, scene, encode=encode, image_size=size)


def report(output: Path) -> None:
    """Print what is there. Raises UserError if a split has no episode at all."""
    for split in SPLITS:
        count, skipped = (len(list((output / f / split).glob("[!.]*"))) for f in ("annotation", SKIPPED))
        notes = output / SKIPPED / split
        print(
            f"{output}: {count} episodes in {split}"
            + (f"; {skipped} left out, see {notes}" if skipped else "")
        )
        if not count:
            raise UserError(f"{output}: no episode of {split} could be read; see {notes}")


@entry("step1_prepare")
def main(cfg: DictConfig) -> None:
    state = processes()
    output = check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    check_counts(cfg, batch=1, **({} if cfg.image_size is None else {"image_size": 1}))
    source = read_source(cfg.data)
    recordings = {split: source.open(split) for split in SPLITS}
    weights = find_vae(cfg.vae)
    vae = pipeline.load_part(AutoencoderKLTemporalDecoder, weights).requires_grad_(False)
    if cfg.image_size is None and vae.config.sample_size > LARGEST:
        raise UserError(
            f"image_size=: {weights} is for pictures of {vae.config.sample_size} pixels a side; "
            "give that of your video model, image_size=256 for preset=paper"
        )
    manifest = {  # what the latents are made of and with; a run that goes on must agree in all of it
        "data": source.identity(),
        "splits": {split: found.fingerprint for split, found in recordings.items()},
        "vae": fingerprint(weights),
        "scaling": vae.config.scaling_factor,
        "image_size": cfg.image_size or vae.config.sample_size,
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

    encode = partial(encode_frames, vae.to(state.device), cfg.batch)
    write_episodes(output, recordings, encode, manifest["image_size"])
    state.wait_for_everyone()
    if state.is_main_process:
        report(output)


if __name__ == "__main__":
    main()
