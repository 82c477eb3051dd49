"""LeRobot's data sets: what LeRobot's own reader returns, as the record beside each says."""

import json
from pathlib import Path

import numpy as np
import pytest

from defi.data import open_dataset

pytest.importorskip("pyarrow")
CLOSE = 0.25  # of 255 in mean colour: neighbouring frames differ by more than twice as much


@pytest.fixture(scope="module")
def recorded(reference: Path) -> dict[Path, dict]:
    """Data set -> what a reader must find."""
    files = sorted((reference / "lerobot").glob("expected_*.json"))
    if not files:
        pytest.skip(f"no recorded LeRobot data under {reference / 'lerobot'}")
    return {f.with_name(f.stem.replace("expected_", "data_")): json.loads(f.read_text()) for f in files}


def test_lerobot_episodes_and_instructions(recorded: dict[Path, dict]) -> None:
    for root, expected in recorded.items():
        data = open_dataset({"format": "lerobot", "root": str(root)}, "all")
        assert (data.lengths.tolist(), data.fps) == (expected["lengths"], expected["fps"])
        assert (len(data), int(data.lengths.sum())) == (expected["episodes"], expected["frames"])
        episodes = list(map(data.episode, range(len(data))))
        texts = [episode.text(position) for episode in episodes for position in range(episode.length)]
        assert texts == expected["instructions"]
        assert {sentence for e in episodes for _, sentence in e.sentences()} <= {*expected["tasks"].values()}


def test_lerobot_frames_actions_and_state_by_number(recorded: dict[Path, dict]) -> None:
    """Frame by frame in a shuffled order, then those of an episode at once."""
    for root, expected in recorded.items():
        data = open_dataset({"format": "lerobot", "root": str(root)}, "all")
        samples = expected["samples"]
        for number in np.random.default_rng(0).permutation(len(samples)):
            sample = samples[number]
            episode = data.episode(sample["episode"])
            row = int(data.motions.rows(np.array([episode.start + sample["frame"]]))[0])
            assert row == sample["index"] and episode.text(sample["frame"]) == sample["instruction"]
            np.testing.assert_allclose(data.motions.state[row], sample["state"], atol=1e-5)
            there = [a for a, pad in zip(sample["action_chunk"], sample["action_is_pad"]) if not pad]
            np.testing.assert_allclose(data.motions.actions[row : row + len(there)], there, atol=1e-5)
            assert len(there) == min(len(sample["action_chunk"]), episode.length - sample["frame"])
            pictures = data.read(episode, [sample["frame"]], data.cameras)
            check(data.cameras, sample, {camera: stack[0] for camera, stack in pictures.items()})
        for number in range(len(data)):
            mine = [sample for sample in samples if sample["episode"] == number]
            positions = [sample["frame"] for sample in reversed(mine)]
            pictures = data.read(data.episode(number), positions, data.cameras[::-1])
            for place, sample in enumerate(reversed(mine)):
                check(data.cameras, sample, {camera: stack[place] for camera, stack in pictures.items()})


def check(cameras: tuple[str, ...], sample: dict, pictures: dict[str, np.ndarray]) -> None:
    assert {key.rpartition(".")[2] for key in sample["mean_rgb"]} == set(cameras)
    for key, mean in sample["mean_rgb"].items():
        picture, (channels, *size) = pictures[key.rpartition(".")[2]], sample["shape"][key]
        assert picture.shape == (*size, channels) and picture.dtype == np.uint8
        assert np.abs(picture.mean((0, 1)) - mean).max() < CLOSE, sample["index"]
