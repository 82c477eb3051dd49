"""Stage 2's data beside what the published pipeline yields: pairs, texts, pictures, augmentation, shares."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from defi.config import CONFIG_DIR
from Step2_GIDM.data.augment import Augmentation, Draw
from Step2_GIDM.data.build import held_out_pairs, training_pairs
from Step2_GIDM.data.pairs import Clip, PairDataset

pytestmark = pytest.mark.filterwarnings("ignore:.*(are left out|too few episodes):UserWarning")


@pytest.fixture(scope="module")
def recorded(reference: Path) -> dict[str, Any]:
    file = reference / "pipelines" / "stage2.json"
    if not file.is_file():
        pytest.skip(f"no recording at {file}")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def arrays(reference: Path) -> Mapping[str, np.ndarray]:
    file = reference / "pipelines" / "stage2_arrays.npz"
    if not file.is_file():
        pytest.skip(f"no recording at {file}")
    return np.load(file, allow_pickle=False)


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """configs/data/pairs_oxe.yaml as the commands read it."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return OmegaConf.to_container(compose("data/pairs_oxe"))["data"]


@pytest.fixture(scope="module")
def root(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all data sets that were recorded."""
    together = tmp_path_factory.mktemp("rlds")
    for place in (reference / "rlds", reference / "pipelines" / "rlds_made"):
        for folder in place.glob("*/"):
            (together / folder.name).symlink_to(folder, target_is_directory=True)
    return together


@pytest.fixture(scope="module")
def mixture(table: dict[str, Any], root: Path):
    """The section of a mixture of some sets, with settings of each changed."""

    def section(weights: Mapping[str, float], **changes: Any) -> dict[str, Any]:
        if missing := [name for name in weights if not (root / name).is_dir()]:
            pytest.skip(f"no data set {', '.join(missing)}")
        sets = {name: table["sets"][name] | changes for name in weights}
        given = {"root": str(root), "index": str(root / "index"), "mixture": "own"}
        return table | given | {"mixtures": {"own": dict(weights)}, "sets": sets}

    return section


def parts(recorded: dict[str, Any]) -> list[tuple[str, bool, int, dict[str, Any]]]:
    """Every data set's part, whether it is held out, with every window that was recorded."""
    return [
        (name, part == "held_out", int(window), found)
        for name, data in recorded["data_sets"].items()
        for part, split in data["parts"].items()
        for window, found in split.get("windows", {}).items()
    ]


def opened(section: dict[str, Any], name: str, side: int, *, held_out: bool = False) -> PairDataset:
    """One data set of a mixture, without augmentation."""
    pairs = held_out_pairs(section, side) if held_out else training_pairs(section, side, augment=False)
    return pairs.sets[name]


def test_pipelines_stage2_pairs_and_texts(recorded: dict[str, Any], mixture) -> None:
    for name, held_out, window, found in parts(recorded):
        section = mixture({name: 1.0}, distance=[window - 1] * 2)
        data = opened(section, name, 28, held_out=held_out)
        assert len(data) == found["pairs"]
        mine: dict[int, list[tuple[list[int], str]]] = {}
        for index in range(len(data)):
            clip, now = data.locate(index)
            pair = [clip.start + position for position in clip.pair(now, window - 1)]
            mine.setdefault(data.source.clips.number(clip), []).append((pair, clip.text(now)))
        assert list(mine) == [episode["episode"] for episode in found["episodes"]]
        assert data.source.dropped == len(found["dropped"]) and not set(mine) & set(found["dropped"])
        for episode in found["episodes"]:
            pairs, texts = zip(*mine[episode["episode"]])
            assert list(pairs) == episode["pairs"], (name, window, episode["episode"])
            assert set(texts) == set(episode["stored_text"])
            said = dict(zip(episode["stored_text"], episode["text"]))
            expected = episode["text_of_pair"] or [said[texts[0]]] * len(texts)
            assert [said[text] for text in texts] == expected


def test_pipelines_stage2_samples_show_the_frames_of_their_pair(recorded: dict[str, Any], mixture) -> None:
    for name, held_out, window, found in parts(recorded):
        data = opened(mixture({name: 1.0}, distance=[window - 1] * 2), name, 28, held_out=held_out)
        first = 0
        for episode in found["episodes"]:
            for place in {0, len(episode["pairs"]) // 2, len(episode["pairs"]) - 1}:
                now, later = episode["pairs"][place]
                expected = data.source.data.frames(episode["episode"], [now, later], data.source.picture)
                assert np.array_equal(data.frames(first + place).permute(0, 2, 3, 1).numpy(), expected)
            sample = data.sample(first, np.random.default_rng(0))
            assert sample["text"] in episode["stored_text"]
            first += len(episode["pairs"])


def test_pipelines_stage2_settings_of_the_table(
    recorded: dict[str, Any], table: dict[str, Any], reference: Path
) -> None:
    """Windows of W frames, as the release's lists give them: distances of W - 1."""
    for name, data in recorded["data_sets"].items():
        windows = data["windows_that_can_be_drawn"]
        assert table["sets"][name]["image"] == data["image_key"]
        assert table["sets"][name]["distance"] == [min(windows) - 1, max(windows) - 1]
    file = reference / "pipelines" / "training.json"
    facts = json.loads(file.read_text())["facts"] if file.is_file() else []
    for fact in facts:
        if fact["stage"] == 2 and fact["fact"].startswith("W that can be drawn"):
            known = fact["value"].keys() & table["sets"].keys()
            assert known, "the release's lists and the table have sets in common"
            for name in known:
                low, high = fact["value"][name]
                assert table["sets"][name]["distance"] == [low - 1, high - 1], name


def test_pipelines_stage2_sets_too_small_to_hold_out(recorded: dict[str, Any], mixture) -> None:
    """The release fails on them; here they train on the same pairs, and what is held out is said."""
    for name, data in recorded["data_sets"].items():
        if "raises" not in data["parts"].get("held_out", {}):
            continue
        with pytest.warns(UserWarning, match=f"{name}: too few episodes to hold any out"):
            held_out = held_out_pairs(mixture({name: 1.0}), 28)
        assert len(held_out) == len(opened(mixture({name: 1.0}), name, 28))


def test_pipelines_stage2_sizes_and_shares(recorded: dict[str, Any], mixture) -> None:
    for name, data in recorded["data_sets"].items():
        assert len(training_pairs(mixture({name: 1.0}), 28)) == data["num_transitions"]
    for name, run in recorded["whole_run"].items():
        _, *shape, side = run["videos_shape"]
        pairs = training_pairs(mixture({name: 1.0}), side)
        sample = pairs.sample(len(pairs) // 2, np.random.default_rng(0))["frames"]
        assert list(sample.shape) == [*shape, side] and str(sample.dtype) == run["dtype"]
        levels = sample * 255
        assert sample.min() >= 0 and sample.max() <= 1 and (levels - levels.round()).abs().max() < 1e-3
        assert len(pairs) == run["len"]
    run = recorded["mixture_run"]
    pairs = training_pairs(mixture(dict(run["mixture"])), 28)
    assert abs(len(pairs) - run["dataset_length"]) <= len(run["mixture"])
    shares = pairs.shares()
    for (name, _), expected in zip(run["mixture"], run["sample_weights"]):
        assert shares[name] == pytest.approx(expected, abs=1 / len(pairs))
    total = sum(run["drawn_of_1500"].values())
    for name, drawn in run["drawn_of_1500"].items():
        assert abs(drawn - total * shares[name]) < 4 * (total * shares[name]) ** 0.5


def test_pipelines_stage2_resized_pictures(
    recorded: dict[str, Any], arrays: Mapping[str, np.ndarray], mixture
) -> None:
    """To a level where nothing is lost in coding.

    TensorFlow decodes JPEG by a faster, coarser transform (1.2 levels in the mean, 16 at most on these; with
    that decoder the pictures are equal); what the filter adds must be less than a bilinear one would.
    """
    for key in (key for key in arrays if key.startswith("resized|")):
        _, name, split, episode, step = key.split("|")
        expected = torch.from_numpy(arrays[key]).permute(2, 0, 1).float()
        side = expected.shape[-1]
        section = mixture({name: 1.0}, split=split, trim=[0, 0], drop_unlabelled=False)
        data = opened(section, name, side)
        source = data.source.data
        index = int(source.lengths[: int(episode)].sum()) + int(step)
        found = data.sample(index, np.random.default_rng(0))["frames"][0] * 255
        difference = (found - expected).abs()
        (coded,) = source.encoded(int(episode), [int(step)], data.source.picture)
        if coded[:2] != b"\xff\xd8":
            assert difference.max() < 1.001, key
            continue
        bilinear = TF.resize(data.frames(index)[0], [side, side], antialias=True)
        assert difference.mean() < min(2, (bilinear - expected).abs().mean()), key


def test_pipelines_stage2_augmentation(
    recorded: dict[str, Any], arrays: Mapping[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded parameters in place of a draw, on the way that every sample takes; both frames alike."""
    if "augmented_source" not in arrays:
        pytest.skip("no augmented pictures")
    picture = arrays["augmented_source"]

    class Still:
        clips, lengths, fingerprint = [Clip("picture", 0, 2)], np.array([2]), "still"

        def read(self, clip: Clip, positions: list[int]) -> np.ndarray:
            return np.stack([picture for _ in positions])

    side = len(picture)
    data = PairDataset(Still(), image_size=side, distance=(1, 1), augmentation=Augmentation())
    for number, given in enumerate(recorded["augmentation_examples"]):
        names = {"brightness": "brightness_delta", "hue": "hue_delta"}
        names |= {"contrast": "contrast_factor", "saturation": "saturation_factor"}
        draw = Draw(**given["crop"], **{mine: given[theirs] for mine, theirs in names.items()})
        monkeypatch.setattr(Augmentation, "draw", lambda self, rng, draw=draw: draw)
        frames = data.sample(0, np.random.default_rng(0))["frames"] * 255
        expected = torch.from_numpy(arrays[f"augmented|{number}"]).permute(2, 0, 1)
        difference = (frames - expected).abs()
        assert difference.max() < 1.001
        assert (difference > 0.5).float().mean() < 1e-3
