"""Captioned demonstrations → latents, annotations and videos in VPP's layout (`Step1_GFDM.data` reads them).

    python -m Step1_GFDM.prepare data.root=<folder in CALVIN's format> vae=<run> output=<folder>

Each annotated span becomes an episode. Its annotation is written last, so an episode is there as a whole or
not at all: a killed run goes on with `resume=true`. Processes of `accelerate launch` share the episodes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKLTemporalDecoder
from jaxtyping import Float, UInt8
from omegaconf import DictConfig
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from defi.calvin import CalvinFolder
from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.fingerprint import fingerprint
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from defi.video import prepare_frames, write_mp4
from Step1_GFDM.data import LATENTS
from Step1_GFDM.vae import load_vae

CAMERAS = ("rgb_static", "rgb_gripper")
SOURCE_FPS = 30
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What the latents were made of and with; a run that goes on must agree in all of it."""

    source: str
    splits: dict[str, str]  # ours → fingerprint of the source's
    vae: str  # fingerprint
    scaling: float
    image_size: int
    fps: float
    cameras: list[str]

    def check(self, file: Path) -> None:
        """Raises UserError if the folder was begun with something else."""
        before = json.loads(file.read_text())
        for key, value in asdict(self).items():
            if before.get(key) != value:
                raise UserError(
                    f"{file}: begun with {key}={before.get(key)}, now {value}; choose another output="
                )


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


def write_episode(
    output: Path,
    split: str,
    name: str,
    views: dict[str, UInt8[np.ndarray, "F H W 3"]],
    text: str,
    *,
    encode: Encoder,
    image_size: int,
    fps: float,
) -> None:
    """Latents and videos of all cameras, then the annotation that makes them count."""
    latents, videos = [], []
    for camera, frames in views.items():
        latent = f"latent_videos/{split}/{name}/{camera}.safetensors"
        video = f"videos/{split}/{name}/{camera}.mp4"
        (output / latent).parent.mkdir(parents=True, exist_ok=True)
        coded = encode(prepare_frames(frames, image_size))
        write_file(output / latent, save({LATENTS: coded.half().contiguous()}))
        write_mp4(output / video, frames, fps)
        latents.append({"latent_video_path": latent})
        videos.append({"video_path": video})
    annotation = {
        "episode_id": name,
        "texts": [text],
        "videos": videos,
        "latent_videos": latents,
        "video_length": len(frames),
    }
    write_file(output / "annotation" / split / f"{name}.json", json.dumps(annotation))


@entry("step1_prepare")
def main(cfg: DictConfig) -> None:
    state = PartialState()
    output = check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    root, every = Path(cfg.data.root), int(cfg.data.every)
    if every < 1:
        raise UserError(f"data.every={every}: must be at least 1")
    folders = {ours: CalvinFolder(root / theirs) for ours, theirs in cfg.data.splits.items()}
    vae = load_vae(cfg.vae)
    manifest = Manifest(
        source=str(root),
        splits={split: data.fingerprint for split, data in folders.items()},
        vae=fingerprint(find_weights(cfg.vae, "vae")),
        scaling=vae.config.scaling_factor,
        image_size=vae.config.sample_size,
        fps=SOURCE_FPS / every,
        cameras=list(CAMERAS),
    )
    if cfg.resume and (output / MANIFEST).is_file():
        manifest.check(output / MANIFEST)
    if state.is_main_process:
        prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
        for split in folders:
            (output / "annotation" / split).mkdir(parents=True, exist_ok=True)
        write_file(output / MANIFEST, json.dumps(asdict(manifest), indent=1))
    state.wait_for_everyone()

    encode = Encoder(vae.to(state.device), cfg.batch)
    todo = [
        (split, f"{number:06d}", data, span)
        for split, data in folders.items()
        for number, span in enumerate(data.spans)
        if not (output / "annotation" / split / f"{number:06d}.json").exists()
    ][state.process_index :: state.num_processes]
    for split, name, data, span in track(todo, "latents", disable=not state.is_local_main_process):
        frames = range(span.start, span.end + 1, every)
        views = {camera.removeprefix("rgb_"): data.stack(camera, frames) for camera in CAMERAS}
        write_episode(
            output,
            split,
            name,
            views,
            span.instruction,
            encode=encode,
            image_size=manifest.image_size,
            fps=manifest.fps,
        )
    state.wait_for_everyone()
    if state.is_main_process:
        counts = ", ".join(f"{len(data.spans)} episodes in {split}" for split, data in folders.items())
        print(f"{output}: {counts}")


if __name__ == "__main__":
    main()
