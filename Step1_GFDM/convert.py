"""Latents in `.pt` files (VPP's) → `.safetensors`, of which a clip is read without its episode.

    python -m Step1_GFDM.convert root=<data set in VPP's layout>

The new file lies beside the old one, then the annotation names it. Values and types stay. What is no `.pt`
is left alone, so a killed run simply goes on; the old files can be deleted afterwards.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import track
from safetensors.torch import save

from defi.config import entry
from defi.engine.output import write_file
from defi.errors import UserError, reading
from Step1_GFDM.data import LATENTS, NotJSON, inside, read_episode


def read_old(path: Path) -> torch.Tensor:
    """The tensor [F, 4, h, w] of a `.pt` file. Raises UserError where it holds something else, or code."""
    with reading(path, "copy it again"):
        latents = torch.load(path, weights_only=True, map_location="cpu")
    if not torch.is_tensor(latents) or latents.dim() != 4 or not latents.is_floating_point():
        raise UserError(f"{path}: holds no latents [frames, 4, h, w]; run Step1_GFDM.prepare again")
    return latents


def convert(root: Path, annotation: Path) -> int:
    """Convert an episode's `.pt` files; returns their number, 0 and says so where its annotation is no JSON.

    Raises UserError for damage, and if the new file's name is that of another camera.
    """
    try:
        named = read_episode(root, annotation).latents
    except NotJSON as error:
        print(f"left out: {error}")
        return 0
    new = {path: path.removesuffix(".pt") + ".safetensors" for path in named if path.endswith(".pt")}
    for old, path in new.items():
        if path in named:
            raise UserError(f"{annotation}: names {old} and {path}; rename one of them")
        write_file(root / path, save({LATENTS: read_old(root / old).contiguous()}))
    if new:
        values = json.loads(annotation.read_text())
        for latent in values["latent_videos"]:
            path = inside(root, latent["latent_video_path"])
            latent["latent_video_path"] = new.get(path, path)
        write_file(annotation, json.dumps(values))
    return len(new)


@entry("step1_convert")
def main(cfg: DictConfig) -> None:
    root = Path(cfg.root)
    annotations = sorted(root.glob("annotation*/*/*.json"))
    if not annotations:
        raise UserError(f"{root}/annotation: no annotations; give a data set in VPP's layout")
    with ProcessPoolExecutor(cfg.workers) as pool:
        jobs = pool.map(partial(convert, root), annotations, chunksize=16)
        counts = list(track(jobs, "episodes", total=len(annotations)))
    print(f"{root}: {sum(counts)} files converted, {len(counts)} episodes looked at")


if __name__ == "__main__":
    main()
