"""What grows with the data set: `python -m benchmarks.scaling [--samples 1000 1000000] [--workers 0 2]`.

Stage 2's pairs of a made-up data set (an index of so many frames in episodes of 50; the same small pictures
again and again) go through the training's own order, random numbers and loader (`defi.engine.data.Feed`). Of
each combination, in a process of its own:
  start    seconds from nothing to the first batch
  step     milliseconds that a step of one process waits for its data, and of the processor in that process
  memory   MB that the process and its loader workers hold for themselves, beyond what they had before
Flat in the number of samples is what should be flat, but for the index, 8 bytes an episode. Reading from disk
is not in it; benchmarks of the formats say what that costs.
"""

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from defi.data import Dataset, Episode
from defi.data.episode import Frames
from defi.engine.config import TrainerConfig
from defi.engine.data import Feed
from Step2_GIDM.data.pairs import PairDataset

LENGTH, SIDE, BATCH = 50, 64, 16  # frames of an episode; pixels; samples of a step in each process


class MadeUp(Dataset):
    """Episodes that are made when asked for, all with the same pictures."""

    cameras, fingerprint = ("static",), "made up"

    def __init__(self, frames: int) -> None:
        self.lengths = np.full(max(frames // LENGTH, 1), LENGTH)
        self._pictures = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)

    def episode(self, number: int) -> Episode:
        return Episode(f"{number}", number * LENGTH, LENGTH, ("open the drawer",), "open_drawer")

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        return dict.fromkeys(cameras, self._pictures[: len(positions)])


def own_memory() -> int:
    """Bytes that this process and its children share with nobody."""
    total = 0
    for pid in ("self", *(child.pid for child in multiprocessing.active_children())):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return total


def measure(samples: int, workers: int, processes: int, steps: int) -> list[float]:
    """Seconds to start, milliseconds to wait and of the processor per step, MB."""
    torch.set_num_threads(1)
    before, began = own_memory(), time.perf_counter()
    pairs = PairDataset(MadeUp(samples), ["static"], image_size=SIDE, distance=[9, 9])
    trainer = TrainerConfig(global_batch=BATCH * processes, max_steps=1, lr=1.0, workers=workers)
    process = {"num_processes": processes, "process_index": processes - 1}
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), **process)
    feed = Feed(pairs, trainer, accelerator, seed=0, start=0)
    feed.next_step()
    started, waits, processor = time.perf_counter() - began, [], time.process_time()
    for _ in range(steps):
        feed.waited = 0.0
        feed.next_step()
        waits.append(1000 * feed.waited)
    processor, held = 1000 * (time.process_time() - processor) / steps, own_memory() - before
    feed.close()
    return [started, statistics.median(waits), processor, held / 1e6]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**n for n in range(3, 8)])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 8, 64], help="among which steps are cut"
    )
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")  # what is imported already is not counted as the start
    print("   samples  workers  processes    start      wait  processor     memory")
    for samples, workers, processes in itertools.product(given.samples, given.workers, given.processes):
        with ProcessPoolExecutor(1, context) as pool:
            start, wait, processor, memory = pool.submit(
                measure, samples, workers, processes, given.steps
            ).result()
        line = f"{samples:10,} {workers:8} {processes:10} {start:7.2f} s {wait:6.1f} ms {processor:7.1f} ms"
        print(f"{line} {memory:7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
