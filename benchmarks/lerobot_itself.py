"""LeRobot's own loader, for benchmarks/lerobot_loader.py: started by it, with a Python that has it.

The argument is a JSON object: root, samples, warm_up, workers, batch, chunk, backend. Prints another one:
samples per second, and milliseconds of processor time of each, in all processes.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import DataLoader, RandomSampler


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    fps = json.loads(Path(given["root"], "meta/info.json").read_text())["fps"]
    steps = {"action": [i / fps for i in range(given["chunk"])]}
    backend = {"video_backend": given["backend"]}
    data = LeRobotDataset("local/data", root=given["root"], delta_timestamps=steps, **backend)
    count = given["warm_up"] + given["samples"]
    sampler = RandomSampler(data, True, count, torch.Generator().manual_seed(0))
    work = sum(os.times()[:4])
    batches = iter(DataLoader(data, given["batch"], sampler=sampler, num_workers=given["workers"]))
    drawn = 0
    while drawn < given["warm_up"]:
        drawn += len(next(batches)["task"])
    began, drawn = time.perf_counter(), 0
    for batch in batches:
        drawn += len(batch["task"])
    rate = drawn / (time.perf_counter() - began)
    del batches  # its workers end, and their time counts
    print(json.dumps({"rate": rate, "work": 1000 * (sum(os.times()[:4]) - work) / count}))


if __name__ == "__main__":
    main()
