"""Clips of latents per second from each file format: `python -m benchmarks.latents`.

A clip is 16 frames, two apart, of a random episode: what a sample of stage 1 reads. `.pt` as published
loaders read it (the whole episode), `.pt` memory-mapped, `.safetensors` (what Step1_GFDM.prepare writes), and
`.npy` memory-mapped. Rates are per second of processor time, so that other work on the machine does not
count; the files are in the page cache.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from Step1_GFDM.data import LATENTS, read_latents

SHAPE = (4, 32, 32)
CLIP = 2 * np.arange(16)


def whole_pt(file: Path, first: int) -> torch.Tensor:
    """As published: load the episode, take the clip."""
    return torch.load(file, weights_only=True)[torch.from_numpy(CLIP + first)].float()


def mapped_npy(file: Path, first: int) -> torch.Tensor:
    return torch.from_numpy(np.load(file, mmap_mode="r")[CLIP + first]).float()


def ours(file: Path, first: int) -> torch.Tensor:
    return read_latents(file, CLIP + first)


READERS: dict[str, tuple[str, Callable[[Path, int], torch.Tensor]]] = {
    ".pt, whole episode": (".pt", whole_pt),
    ".pt, memory-mapped": (".pt", ours),
    ".safetensors": (".safetensors", ours),
    ".npy, memory-mapped": (".npy", mapped_npy),
}


def write(folder: Path, episodes: int, frames: int) -> None:
    """Episodes of random latents in all formats."""
    for number in range(episodes):
        latents = torch.randn(frames, *SHAPE).half()
        torch.save(latents, folder / f"{number}.pt")
        save_file({LATENTS: latents}, folder / f"{number}.safetensors")
        np.save(folder / f"{number}.npy", latents.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--frames", type=int, nargs="*", default=[60, 300, 1000])
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'clips/s per process':24}" + "".join(f"{frames:>8} frames" for frames in given.frames))
    rates: dict[str, list[float]] = {name: [] for name in READERS}
    for frames in given.frames:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place), given.episodes, frames)
            for name, (suffix, read) in READERS.items():
                rng, clips, began = np.random.default_rng(0), 0, time.process_time()
                while time.process_time() - began < given.seconds:
                    read(
                        Path(place) / f"{rng.integers(given.episodes)}{suffix}",
                        int(rng.integers(frames - 31)),
                    )
                    clips += 1
                rates[name].append(clips / (time.process_time() - began))
    for name, found in rates.items():
        print(f"{name:24}" + "".join(f"{rate:15.0f}" for rate in found))


if __name__ == "__main__":
    main()
