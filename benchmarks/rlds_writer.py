"""Made-up RLDS data sets for benchmarks and tests, written as `defi.data.rlds.write` does."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from defi.data.rlds.write import VERSION, Shards, describe, example, features_dict, image, steps, tensor, text
from defi.picture import encode_picture


def write_set(
    root: Path,
    step_features: Mapping[str, Any],
    splits: Mapping[str, Sequence[Iterable[Mapping[str, Any]]]],
    *,
    name: str = "toy",
    beside: Mapping[str, Any] | None = None,
) -> Path:
    """A data set root/name/1.0.0. step_features: its specification. splits: the examples of each shard.

    beside: features of an episode beside its steps; None: its file_path. Returns root/name.
    """
    folder = root / name / VERSION
    folder.mkdir(parents=True)
    written = [Shards(folder, split, math.inf) for split in splits]
    for split, shards in zip(written, splits.values()):
        for episodes in shards:
            split.begin()
            for episode in episodes:
                split.add(example(episode))
        split.close(name)
    beside = beside or {"episode_metadata": features_dict(file_path=text())}
    features = features_dict(**beside, steps=steps(**step_features))
    describe(folder, name, features, written)
    return root / name


def write_videos(
    root: Path, splits: Mapping[str, Sequence[Sequence[int]]], *, name: str = "toy", size: int = 48
) -> Path:
    """Episodes of these lengths, with an instruction and a camera whose pictures show episode and step."""

    def episode(number: int, length: int) -> dict[str, Any]:
        frames = np.zeros((length, size, size, 3), np.uint8)
        frames[..., 0], frames[..., 1] = 10 * number, 8 * np.arange(length)[:, None, None]
        return {
            "episode_metadata/file_path": [f"/{number}".encode()],
            "steps/observation/image": [encode_picture(frame, "PNG") for frame in frames],
            "steps/observation/depth": [encode_picture(frame[..., 0], "PNG") for frame in frames],
            "steps/language_instruction": [f"do thing {number}".encode()] * length,
            "steps/action": np.arange(length * 7, dtype=np.float32) - number,
            "steps/is_last": [int(i == length - 1) for i in range(length)],
            "steps/reward": np.zeros(length, np.float32),
        }

    numbers = iter(range(1000))
    written = {
        split: [[episode(next(numbers), length) for length in shard] for shard in shards]
        for split, shards in splits.items()
    }
    observation = features_dict(image=image(size, size, "png"), depth=image(size, size, "png", channels=1))
    return write_set(
        root,
        {
            "observation": observation,
            "language_instruction": text(),
            "action": tensor("float32", 7),
            "is_last": tensor("bool"),
            "reward": tensor("float32"),
        },
        written,
        name=name,
    )
