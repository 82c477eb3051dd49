"""Pairs of frames per second and core from RLDS: `python -m benchmarks.rlds [--tensorflow PYTHON]`.

Makes up a data set (once, in --folder), then draws pairs of frames 9 steps apart from all of it, in random
order, resized and with one augmentation per pair, in one process on one core:
  ours         Step2_GIDM's data set, as a loader worker runs it
  tensorflow   tensorflow_datasets and tf.data doing the same work (benchmarks/rlds_tensorflow.py), with the
               interpreter --tensorflow of an environment that has both
and prints how much the resident memory grows on the way. Rates are per second of processor time, so that
other work on the machine does not count; the files are in the page cache.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks.rlds_writer import write_set
from defi.config import CONFIG_DIR
from defi.data.rlds.write import features_dict, image, tensor, text
from defi.picture import encode_picture

SIDE, STEPS, PER_SHARD = 256, 30, 50
TENSORFLOW_PAIRS = 4000  # enough for its rate
WARM_UP = 500  # pairs before the clock starts: imports, caches, the first pages of the index
SETTINGS = {"side": 224, "distance": 9}


def picture_noise(rng: np.random.Generator) -> np.ndarray:
    """A ground with the detail of a photograph: noise at three scales."""
    ground = sum(
        np.kron(rng.normal(0, 14, (SIDE // size, SIDE // size, 3)), np.ones((size, size, 1)))
        for size in (32, 8, 4)
    )
    return (127 + ground).clip(0, 255).astype(np.uint8)


def episodes(numbers: range) -> Iterator[dict[str, Any]]:
    """Episodes of STEPS frames: a square that crosses a noisy ground."""
    for number in numbers:
        rng = np.random.default_rng(number)
        ground = picture_noise(rng)
        coded = []
        for step in range(STEPS):
            frame = ground.copy()
            frame[100:140, 6 * step : 6 * step + 40] = (220, 40, 40)
            coded.append(encode_picture(frame, "JPEG"))
        yield {
            "episode_metadata/file_path": [b"made up"],
            "steps/observation/image": coded,
            "steps/language_instruction": [f"push the square {number}".encode()] * STEPS,
            "steps/action": rng.normal(size=(STEPS, 7)).astype(np.float32),
        }


def make_set(folder: Path, count: int) -> Path:
    """The data set, made if it is not there."""
    name = f"made_up_{count}"
    if not (folder / name / "1.0.0" / "dataset_info.json").is_file():
        print(f"making {count} episodes in {folder / name} …")
        shards = [episodes(range(i, min(i + PER_SHARD, count))) for i in range(0, count, PER_SHARD)]
        features = {
            "observation": features_dict(image=image(SIDE, SIDE, "jpeg")),
            "language_instruction": text(),
            "action": tensor("float32", 7),
        }
        write_set(folder, features, {"train": shards}, name=name)
    return folder / name


def resident() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def ours(root: Path, pairs: int) -> dict[str, float]:
    """Pairs per second of this project's data set on one core, and the growth of memory."""
    import torch

    from defi.engine.data import StepOrder
    from Step2_GIDM.data.build import build_pairs
    from Step2_GIDM.data.images import Augmentation

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    section = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "data" / "rlds.yaml"))
    section |= {"root": str(root), "split": "train", "index": str(root.parent / "index")}
    section |= {"distance": [SETTINGS["distance"]] * 2, "augmentation": asdict(Augmentation())}
    began = time.perf_counter()
    data = build_pairs(section, SETTINGS["side"])
    opened = time.perf_counter() - began
    order = iter(StepOrder(len(data), seed=0, start=0, global_batch=1, micro_batch=1, process=(0, 1)))

    def draw(count: int) -> None:
        for _ in range(count):
            ((epoch, index),) = next(order)
            data.sample(index, np.random.default_rng([epoch, index]))

    draw(WARM_UP)
    memory, began = resident(), time.process_time()
    draw(pairs)
    seconds = time.process_time() - began
    growth = resident() - memory
    rate = pairs / seconds
    return {"rate": rate, "pairs": pairs, "growth": growth, "memory": resident(), "opened": opened}


def in_process(root: Path, pairs: int) -> dict[str, float]:
    """`ours` in a fresh process, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(ours, (root, pairs))


def tensorflow(python: str, root: Path, pairs: int) -> dict[str, float]:
    """The same by tensorflow_datasets and tf.data, in the environment of `python`."""
    given = json.dumps({**SETTINGS, "root": str(root), "pairs": pairs, "warm_up": WARM_UP})
    command = [python, str(Path(__file__).with_name("rlds_tensorflow.py")), given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark_rlds"))
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--tensorflow", metavar="PYTHON", help="interpreter that has tensorflow_datasets")
    given = parser.parse_args()
    root = make_set(given.folder, given.episodes)
    found = {"ours": in_process(root, given.pairs)}
    if given.tensorflow:
        found["tensorflow"] = tensorflow(given.tensorflow, root, min(given.pairs, TENSORFLOW_PAIRS))
    for name, numbers in found.items():
        grew = f"grew {numbers['growth'] / 1e6:+.0f} MB over {numbers['pairs']:,} pairs"
        print(
            f"{name:12}{numbers['rate']:8.0f} pairs/s per core; first pair after {numbers['opened']:.1f} s; "
            f"memory {numbers['memory'] / 1e6:.0f} MB, {grew}"
        )
    if "tensorflow" in found:
        print(f"{'ratio':12}{found['ours']['rate'] / found['tensorflow']['rate']:8.2f}")


if __name__ == "__main__":
    main()
