"""Samples per second from LeRobot's data: `python -m benchmarks.lerobot_loader [--lerobot PYTHON]`.

Makes up a data set (once, in --folder): two cameras of 200² pixels, 7 actions, in LeRobot's format v3.0 with
AV1, with H.264, and with images in Parquet. Then draws samples in random order, in batches of 32, with two
worker processes: the pictures of one frame as floats, the next ten actions, the state, the instruction.
  ours      `data.format=lerobot`
  lerobot   LeRobot's own data set doing the same (benchmarks/lerobot_itself.py), with the interpreter
            --lerobot of an environment that has it, one after the other on the same files
and prints samples per second, milliseconds of processor time of each (on which other work on the machine has
less influence), and how much the memory of all processes grows. The files are in the page cache.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lerobot_itself import measure, processes
from defi.data import Dataset, Episode, open_dataset
from defi.data.lerobot.write import LeRobotWriter

SIDE, LENGTH, FPS, CHUNK, BATCH, WORKERS = 200, 120, 30.0, 10, 32, 2
WARM_UP = 512  # samples before the clock starts: imports, files
LEROBOT_SAMPLES = 2000  # enough for its rate
KINDS = ("av1", "h264", "images")


class MadeUp(Dataset):
    """A square that crosses a noisy ground."""

    root, fingerprint, scope, fps = Path("made up"), "made up", "made up", FPS
    cameras, action_names = ("front", "wrist"), tuple("abcdefg")
    state_names = tuple(f"joint_{i}" for i in range(15))

    def __init__(self, episodes: int) -> None:
        self.lengths = np.full(episodes, LENGTH)
        self.starts = np.arange(episodes) * LENGTH

    def episode(self, number: int) -> Episode:
        return Episode(f"{number:06d}", number * LENGTH, LENGTH, (f"push the square {number % 20}",))

    def read(self, episode: Episode, positions: Any, cameras: Any) -> dict[str, np.ndarray]:
        found = {}
        for number, camera in enumerate(cameras):
            rng = np.random.default_rng([episode.start, number])
            scales = [
                np.kron(rng.normal(0, 14, (SIDE // n, SIDE // n, 3)), np.ones((n, n, 1))) for n in (40, 8, 4)
            ]
            ground = (127 + sum(scales)).clip(0, 255).astype(np.uint8)
            frames = np.repeat(ground[None], len(positions), 0)
            for frame, position in zip(frames, positions):
                frame[80:120, position : position + 40] = (220, 40, 40)
            found[camera] = frames
        return found

    def read_motions(self, frames: range) -> np.ndarray:
        return np.random.default_rng(frames.start).normal(size=(len(frames), 22)).astype(np.float32)


class Samples(torch.utils.data.Dataset):
    """Every frame of a data set, as stage 3 takes it."""

    def __init__(self, root: Path) -> None:
        self.data = open_dataset({"format": "lerobot", "root": str(root)}, "all")
        self.motions, self.ends = self.data.motions, np.cumsum(self.data.lengths)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        episode = self.data.episode(number)
        position = index - episode.start
        pictures = self.data.read(episode, [position], self.data.cameras)
        chunk = np.minimum(np.arange(position, position + CHUNK), episode.length - 1) + episode.start
        rows = self.motions.rows(chunk)
        planes = {camera: np.moveaxis(stack[0], -1, 0).copy() for camera, stack in pictures.items()}
        return {
            **{camera: torch.from_numpy(each).float().div_(255) for camera, each in planes.items()},
            "action": torch.tensor(self.motions.actions[rows]),
            "state": torch.tensor(self.motions.state[rows[0]]),
            "task": episode.text(position),
        }


def make_set(folder: Path, kind: str, episodes: int) -> Path:
    """The data set, made if it is not there."""
    root = folder / f"{kind}_{episodes}"
    if not (root / "meta/stats.json").is_file():
        print(f"making {episodes} episodes in {root} …")
        data = MadeUp(episodes)
        writer = LeRobotWriter(data, root, kind, 100 * 2**20, 200 * 2**20, "made_up")
        for number in range(len(data)):
            writer.add(data.episode(number))
        writer.close()
    return root


def memory() -> int:
    """What this process and its workers hold beside files, in bytes; what they share is counted once."""
    texts = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in processes()]
    return 1024 * sum(
        int(line.split()[1]) for text in texts for line in text.splitlines() if "Pss_Anon" in line
    )


def ours(root: Path, given: dict[str, int]) -> dict[str, float]:
    """What `measure` finds, and the growth of memory from a quarter of the way on."""
    sizes: list[int] = []
    every = max(1, given["samples"] // given["batch"] // 8)
    found = measure(Samples(root), given, lambda batch: batch % every or sizes.append(memory()))
    later = sizes[len(sizes) // 4 :]
    return found | {"memory": later[-1], "growth": later[-1] - later[0]}


def lerobot(python: str, given: dict[str, Any]) -> dict[str, float]:
    command = [python, str(Path(__file__).with_name("lerobot_itself.py")), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark_lerobot"))
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--roots", nargs="+", type=Path, default=[], help="data sets to read instead")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--lerobot", metavar="PYTHON", help="interpreter of an environment with LeRobot")
    backends = {"nargs": "+", "choices": ("torchcodec", "pyav"), "default": ("torchcodec",)}
    parser.add_argument("--backend", **backends, help="LeRobot's video decoders")
    given = parser.parse_args()
    torch.set_num_threads(1)
    roots = {root.name: root for root in given.roots}
    for kind in roots or given.kinds:
        root = roots.get(kind) or make_set(given.folder, kind, given.episodes)
        common = {"warm_up": WARM_UP, "batch": BATCH, "workers": WORKERS}
        found = ours(root, {**common, "samples": given.samples})
        held = f"memory {found['memory'] / 1e6:.0f} MB, grew {found['growth'] / 1e6:+.1f} MB"
        print(f"{kind:12}ours    {report(found)}, over {given.samples:,}; {held}", flush=True)
        for backend in given.backend if given.lerobot else ():
            theirs = {"root": str(root), "chunk": CHUNK, "backend": backend, "samples": LEROBOT_SAMPLES}
            other = lerobot(given.lerobot, {**common, **theirs})
            wall, work = found["rate"] / other["rate"], other["work"] / found["work"]
            ratios = f"ratio {wall:.1f}, by processor time {work:.1f}"
            print(f"{kind:12}lerobot {report(other)} ({backend}); {ratios}", flush=True)


def report(found: dict[str, float]) -> str:
    return f"{found['rate']:6.0f} samples/s, {found['work']:.1f} ms of processor time each"


if __name__ == "__main__":
    main()
