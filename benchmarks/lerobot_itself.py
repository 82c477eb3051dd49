"""LeRobot's own loader, for benchmarks/lerobot_loader.py: started by it, with a Python that has LeRobot.

The argument is a JSON object, root, chunk, backend, and what `measure` is told. Prints what that finds.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler


def processes() -> list[int]:
    """This one and its children."""
    this = os.getpid()
    return [this, *map(int, Path(f"/proc/{this}/task/{this}/children").read_text().split())]


def worked() -> float:
    """Seconds that they have computed."""
    stats = [Path(f"/proc/{each}/stat").read_text().rpartition(") ")[2].split() for each in processes()]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def measure(data: Dataset, given: dict[str, int], watch: Callable[[int], Any] = int) -> dict[str, float]:
    """Random samples in batches: how many per second, and milliseconds of processor time of each.

    given: warm_up (samples before the clock starts), samples, batch, workers. watch: called with each batch's
    number.
    """
    warm_up, count = (given[key] // given["batch"] for key in ("warm_up", "samples"))
    after = 4 * given["workers"]  # so that workers do not end before the clock is read
    sampler = RandomSampler(
        data, True, (warm_up + count + after) * given["batch"], torch.Generator().manual_seed(0)
    )
    batches = iter(DataLoader(data, given["batch"], sampler=sampler, num_workers=given["workers"]))
    for _ in range(warm_up):
        next(batches)
    began, before = time.perf_counter(), worked()
    for number in range(count):
        next(batches)
        watch(number)
    seconds, work, drawn = time.perf_counter() - began, worked() - before, count * given["batch"]
    return {"rate": drawn / seconds, "work": 1000 * work / drawn}


def main() -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    fps = json.loads(Path(given["root"], "meta/info.json").read_text())["fps"]
    steps = {"action": [step / fps for step in range(given["chunk"])]}
    backend = {"video_backend": given["backend"]}
    data = LeRobotDataset("local/data", root=given["root"], delta_timestamps=steps, **backend)
    print(json.dumps(measure(data, given)))


if __name__ == "__main__":
    main()
