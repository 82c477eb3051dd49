"""Stage 1's clips against those of the published code, recorded on a made-up folder in VPP's layout.

Its latents say where they come from: channels 0 and 3 hold the frame's number, 1 the camera, 2 the episode.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from defi.config import CONFIG_DIR
from defi.engine.data import SeededDataset
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.data import Clips, LatentClips, read_episodes

SPLITS = ("train", "val")
DRAWS = 1000  # of a mixture
# Kinds that the published code knows besides those of its mixture, as settings.
OTHERS = {
    "cloth": {"stride": 5, "every": 5, "cameras": [1.0]},
    "xhand": {"stride": 2, "every": 2, "cameras": [0.75, 0.25]},
    "xbot": {"stride": 2, "every": 2, "cameras": [0.5, 0.25, 0.25]},
}


class Recording:
    """What was recorded, and our clips of the same folder, cut as preset=released does it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "vpp_layout"
        self.said: dict[str, Any] = json.loads((folder / "stage1.json").read_text())
        given = ["preset=released", "data=latents_paper", f"data.root='{self.root}'", "output=none"]
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            cfg = compose("step1_train", given)
        self.model = GFDMConfig.from_preset(cfg)
        self.published = OmegaConf.to_container(cfg.data.sets, resolve=True)

    def settings(self, name: str) -> dict[str, Any]:
        """Of a data set, by its kind, which its name tells; what has none is cut as CALVIN, one camera."""
        kinds = {**self.published, **OTHERS, "": {"cameras": [1.0]}}
        section = next(section for kind, section in kinds.items() if kind in name)
        return {**section, "root": str(self.root / name)}

    def open(self, sets: dict[str, dict[str, Any]], split: str) -> LatentClips:
        step = self.model.frame_step
        return LatentClips.from_config({"sets": sets}, frames=self.model.frames, frame_step=step, split=split)


@pytest.fixture(scope="module")
def recording(reference: Path) -> Recording:
    folder = reference / "pipelines"
    if not (folder / "stage1.json").is_file() or not (folder / "vpp_layout").is_dir():
        pytest.skip(f"no recorded clips of stage 1 at {folder}")
    return Recording(folder)


def seen(sample: dict[str, Any]) -> tuple[int, int, list[int], str]:
    """Episode, camera, frames and text of a sample, read off its latents."""
    numbers = sample["latents"][:, :, 0, 0].int().numpy()
    assert (sample["latents"][:, :, :1, :1] == sample["latents"]).all()
    (episode,), (camera,) = np.unique(numbers[:, 2]), np.unique(numbers[:, 1])
    assert (numbers[:, 0] == numbers[:, 3]).all()
    return int(episode), int(camera), numbers[:, 0].tolist(), sample["text"]


def parts(recording: Recording) -> list[tuple[str, str, dict[str, Any]]]:
    """Each recorded data set, split and what it yields."""
    sets = recording.said["data_sets"].items()
    return [(name, split, sets_of[split]) for name, sets_of in sets for split in SPLITS if split in sets_of]


def test_pipelines_every_sample_of_every_data_set(recording: Recording) -> None:
    """From each camera that has a share; exactly, in number and frames."""
    for name, split, expected in parts(recording):
        section = recording.settings(name)
        cameras = len(section["cameras"])
        for camera in range(cameras):
            alone = section | {"cameras": [float(camera == other) for other in range(cameras)]}
            data = recording.open({name: alone}, split)
            assert len(data) == expected["samples_total"], (name, split)
            found = [seen(data.sample(i, np.random.default_rng(i))) for i in range(len(data))]
            assert {look for _, look, _, _ in found} == {camera}
            windows = section.get("clips") != "spread"
            rows = sorted([episode, n[0] if windows else None, n] for episode, _, n, _ in found)
            assert rows == sorted(expected["samples"]), (name, split, camera)


def test_pipelines_lengths_and_texts(recording: Recording) -> None:
    """`state` before `video_length`, the first of several texts, unchanged; videos too long are left out."""
    for name, split, expected in parts(recording):
        lengths = {str(each["episode"]): each["frames"] for each in expected["episodes"]}
        assert {e.id: e.frames for e in read_episodes(recording.root / name, split)} == lengths
        files = [recording.root / each["file"] for each in expected["episodes"]]
        texts = {int((a := json.loads(f.read_text()))["episode_id"]): a["texts"][0] for f in files}
        data = recording.open({name: recording.settings(name)}, split)
        found = [seen(data.sample(i, np.random.default_rng(i))) for i in range(len(data))]
        assert all(text == texts[episode] for episode, _, _, text in found)
        kept = {each["episode"] for each in expected["episodes"] if each["samples"]}
        assert {episode for episode, *_ in found} == kept


def test_pipelines_mixtures(recording: Recording) -> None:
    """Their length, which sample an item takes, and the shares of sets and cameras within 3 sigma."""
    for mixture, splits in recording.said["mixtures"].items():
        names = mixture.split("+")
        for split, expected in splits.items():
            sets = {name: recording.settings(name) for name in names}
            if set(names) == set(recording.published):
                assert [sets[name]["weight"] for name in names] == expected["prob"]
            for name, weight in zip(names, expected["prob"]):
                sets[name]["weight"] = weight
            data = recording.open(sets, split)
            assert [len(clips) for clips in data.sets] == expected["samples_num"]
            assert len(data) == expected["len"]
            check_draws(data, dict(zip(names, data.sets)), expected)


def check_draws(data: LatentClips, sets: dict[str, Clips], expected: dict[str, Any]) -> None:
    """Samples as training draws them: each is its set's sample of the same number, counted round."""
    drawn: list[str] = []
    for name, clips in sets.items():
        clips.clip = noted(drawn, name, clips.clip)
    draws, counts = SeededDataset(data, 0, tolerant=False), Counter()
    for number in range(DRAWS):
        epoch, index = divmod(number, len(data))
        number_of_episode, camera, frames, _ = seen(draws[epoch, index])
        chosen = sets[drawn[-1]]
        episode, start = chosen.locate(index % len(chosen))
        assert str(number_of_episode) == episode.id
        assert frames == chosen.indices(episode, start).tolist()
        counts[f"{drawn[-1]}/{camera}"] += 1
    recorded = Counter(expected["draws_by_set_and_camera"])
    for key in counts.keys() | recorded.keys():
        totals = np.array([DRAWS, recorded.total()])
        found = np.array([counts[key], recorded[key]])
        share = found.sum() / totals.sum()
        sigma = np.sqrt(share * (1 - share) * (1 / totals).sum())
        assert abs(np.subtract(*(found / totals))) <= 3 * sigma, (key, found, totals)


def noted(drawn: list[str], name: str, clip: Callable[..., Any]) -> Callable[..., Any]:
    """`clip`, which from now on leaves the name of its data set."""

    def note(*given: Any) -> Any:
        drawn.append(name)
        return clip(*given)

    return note
