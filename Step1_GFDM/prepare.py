"""Captioned video → latents, annotations and videos in VPP's layout (`Step1_GFDM.data` reads them).

    python -m Step1_GFDM.prepare data=captioned_videos data.root=<folder> vae=<run> output=<folder>

Sources: `Step1_GFDM.sources`. An episode's annotation is written last, so it is there as a whole or not at
all: a killed run goes on with `resume=true`. Processes of `accelerate launch` share the episodes. A damaged
video is reported, noted in `skipped/` and left out; `resume=true` tries it again.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from Step1_GFDM.sources import Recording, Scene, Source, build_source, read_settings

SKIPPED = "skipped"
LARGEST = (
    512  # pixels a side that an autoencoder alone may ask for: SVD's says 768, and no preset works at that
)


@dataclass(frozen=True)
class Manifest:
    """What the latents were made of and with; a run that goes on must agree in all of it."""

    data: dict[str, Any]  # settings of the source
    splits: dict[str, str]  # ours → fingerprint of the source's
    vae: str  # fingerprint
    scaling: float
    image_size: int
    cameras: list[str]
    latents: str
    videos: dict[str, str]  # codec

    def check(self, file: Path) -> None:
        """Raises UserError if the folder was begun with something else."""
        mend = "choose another output="
        before = _settings(read_json(file, mend))
        now = _settings(json.loads(json.dumps(asdict(self))))  # as it comes back from a file
        for key, value in now.items():
            if key not in before:
                raise UserError(f"{file}: does not say {key}=, for it is of an earlier version; {mend}")
            if before[key] != value:
                raise UserError(f"{file}: begun with {key}={before[key]}, now {value}; {mend}")


def _settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest holds, the source's settings under the names that the command line has for them."""
    source = manifest.pop("data", {})
    return {f"data.{key}": value for key, value in source.items()} | manifest


@dataclass
class Encoder:
    """Frames → scaled latents (mode of the posterior), in batches."""

    vae: AutoencoderKLTemporalDecoder
    batch: int

    @torch.inference_mode()
    def __call__(self, frames: Float[Tensor, "F 3 H W"]) -> Float[Tensor, "F 4 h w"]:
        modes = [
            self.vae.encode(part.to(self.vae.device)).latent_dist.mode() for part in frames.split(self.batch)
        ]
        return torch.cat(modes).cpu() * self.vae.config.scaling_factor


def find_vae(path: Path | str) -> Path:
    """The VAE's folder: of a run of `Step1_GFDM.train_vae`, of a diffusers pipeline, or `path` itself."""
    if not (Path(path) / CHECKPOINT).is_file():
        for folder in (Path(path), Path(path) / "vae"):
            if (folder / "config.json").is_file():
                return folder
    return find_weights(path, "vae")


def write_episode(
    output: Path, split: str, name: str, scene: Scene, *, encode: Encoder, image_size: int
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


@dataclass(frozen=True)
class Job:
    """One recording that is not there yet."""

    split: str
    source: Source
    recording: Recording

    def read(self, every: int) -> Scene | UserError:
        """Its scene, or why there is none."""
        try:
            return self.source.read(self.recording, every)
        except UserError as error:
            return error


def read_ahead(jobs: list[Job], every: int) -> Iterator[tuple[Job, Scene | UserError]]:
    """Scenes in order; the next one is read while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(job.read, every) for job in jobs[:1]]
        for number, job in enumerate(jobs):
            scene = coming.pop().result()
            coming = [pool.submit(later.read, every) for later in jobs[number + 1 : number + 2]]
            yield job, scene


@entry("step1_prepare")
def main(cfg: DictConfig) -> None:
    state = processes()
    output = check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    check_counts(cfg, batch=1)
    if cfg.image_size is not None:
        check_counts(cfg, image_size=1)
    settings = read_settings(cfg.data)
    sources = {split: build_source(settings, split) for split in SPLITS}
    weights = find_vae(cfg.vae)
    vae = pipeline.load_part(AutoencoderKLTemporalDecoder, weights).requires_grad_(False)
    if cfg.image_size is None and vae.config.sample_size > LARGEST:
        raise UserError(
            f"image_size=: {weights} is for pictures of {vae.config.sample_size} pixels a side; "
            "give that of your video model, image_size=256 for preset=paper"
        )
    manifest = Manifest(
        data=settings.deciding(),
        splits={split: source.fingerprint for split, source in sources.items()},
        vae=fingerprint(weights),
        scaling=vae.config.scaling_factor,
        image_size=cfg.image_size or vae.config.sample_size,
        cameras=sources["train"].cameras,
        latents="float16 safetensors, posterior's mode × scaling",
        videos=VIDEO_CODEC,
    )
    if cfg.resume and (output / MANIFEST).is_file():
        manifest.check(output / MANIFEST)
    state.wait_for_everyone()  # all have looked at the folder before it changes
    if state.is_main_process:
        prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
        with writing(output, MANIFEST):
            for split in sources:
                for folder in ("annotation", SKIPPED):
                    (output / folder / split).mkdir(parents=True, exist_ok=True)
            write_file(output / MANIFEST, json.dumps(asdict(manifest), indent=1))
    state.wait_for_everyone()

    left = [
        Job(split, source, recording)
        for split, source in sources.items()
        for recording in source.recordings
        if not (output / "annotation" / split / f"{recording.id}.json").exists()
    ]
    jobs = share(left)
    encode = Encoder(vae.to(state.device), cfg.batch)
    coming = read_ahead(jobs, settings.every)
    for job, scene in track(coming, "latents", total=len(jobs), disable=not state.is_local_main_process):
        finish(output, job, scene, encode=encode, image_size=manifest.image_size)
    state.wait_for_everyone()
    if state.is_main_process:
        report(output)


def finish(output: Path, job: Job, scene: Scene | UserError, *, encode: Encoder, image_size: int) -> None:
    """Write an episode, or note why it is left out."""
    name = job.recording.id
    note = output / SKIPPED / job.split / f"{name}.txt"
    with writing(output, f"episode {job.split}/{name}"):
        if isinstance(scene, UserError):
            print(f"left out: {scene}")
            write_file(note, f"{scene}\n")
        else:
            note.unlink(missing_ok=True)  # before the annotation, after which nothing is done again
            write_episode(output, job.split, name, scene, encode=encode, image_size=image_size)


def report(output: Path) -> None:
    """Print what is there. Raises UserError if a split has no episode at all."""
    counts, skipped = (
        {split: len(list((output / folder / split).glob(f"*.{end}"))) for split in SPLITS}
        for folder, end in (("annotation", "json"), (SKIPPED, "txt"))
    )
    left_out = f"; {sum(skipped.values())} left out, see {output / SKIPPED}" if any(skipped.values()) else ""
    print(f"{output}: " + ", ".join(f"{n} episodes in {split}" for split, n in counts.items()) + left_out)
    for split, count in counts.items():
        if count == 0:
            raise UserError(f"{output}: no episode of {split} could be read; see {output / SKIPPED / split}")


if __name__ == "__main__":
    main()
