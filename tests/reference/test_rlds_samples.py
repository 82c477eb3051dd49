"""RLDS written by tensorflow_datasets: episodes, texts and pictures as the record beside it says."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from defi.config import CONFIG_DIR
from defi.data import open_dataset
from defi.data.rlds import RLDSDataset
from defi.data.rlds.episodes import ACTIONS
from Step2_GIDM.data.build import build_pairs


@pytest.fixture(scope="module")
def recorded(reference: Path) -> dict[Path, dict]:
    """Data set -> what a reader must find."""
    files = sorted((reference / "rlds").glob("*_expected.json"))
    if not files:
        pytest.skip(f"no recorded RLDS under {reference / 'rlds'}")
    return {f.with_name(f.name.removesuffix("_expected.json")): json.loads(f.read_text()) for f in files}


@pytest.fixture(scope="module")
def table() -> dict:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return OmegaConf.to_container(compose("data/pairs_oxe"))["data"]


def test_the_table_of_data_sets_is_the_recorded_one(reference: Path, table: dict) -> None:
    recorded = json.loads((reference / "oxe_mixtures.json").read_text())
    sets = {name: (s["primary_image"], s["window"]) for name, s in recorded["datasets"].items()}
    assert {name: (*s["cameras"], s["distance"]) for name, s in table["sets"].items()} == sets
    assert table["mixtures"] == {name: dict(weights) for name, weights in recorded["mixtures"].items()}


def test_every_episode(recorded: dict[Path, dict], table: dict, tmp_path: Path) -> None:
    for folder, splits in recorded.items():
        for split, episodes in splits.items():
            if split.startswith("_"):
                continue
            data = RLDSDataset(folder, split, index=tmp_path)
            picture, language = data.picture(table["sets"][folder.name]["cameras"][0]), data.language(None)
            assert data.lengths.tolist() == [episode["length"] for episode in episodes]
            for number, expected in enumerate(episodes):
                assert data.text(number, language) == expected["language"]
                steps = {"first": 0, "middle": expected["length"] // 2, "last": expected["length"] - 1}
                for coded, place in zip(data.encoded(number, list(steps.values()), picture), steps):
                    assert hashlib.sha1(coded).hexdigest() == expected[f"{place}_image_encoded_sha1"]
                mean = data.frames(number, [0], picture).mean()
                assert mean == pytest.approx(expected["first_image_mean"], abs=1.5)


def test_tensors_have_the_shapes_of_the_specification(recorded: dict[Path, dict], tmp_path: Path) -> None:
    for folder in recorded:
        data = RLDSDataset(folder, index=tmp_path)
        tensors = {
            path: f for path, f in data.spec.items() if f.kind == "tensor" and path.startswith("steps/")
        }
        for path, feature in tensors.items():
            values = data.values(0, path.removeprefix("steps/"))
            assert values.shape == (data.lengths[0], *feature.shape) and values.dtype == feature.dtype
        assert data.values(0, "is_last").tolist() == [False] * (data.lengths[0] - 1) + [True]


def test_rlds_actions_of_every_frame(recorded: dict[Path, dict]) -> None:
    """Joined and numbered as the frames are, with the names of their features; nothing is lost."""
    for folder in recorded:
        data = open_dataset({"format": "rlds", "root": str(folder)}, "all")
        whole = "action" in {path.removeprefix("steps/") for path in data.data.spec}
        parts = ["action"] if whole else [f"action/{name}" for name in ACTIONS]
        expected = [
            np.concatenate([data.data.values(i, part) for part in parts], axis=1) for i in range(len(data))
        ]
        np.testing.assert_array_equal(data.motions.actions, np.concatenate(expected))
        assert len(data.action_names) == 7 and data.cameras[0] in ("image", "image_0")


def test_a_mixture_of_the_table(recorded: dict[Path, dict], table: dict, tmp_path: Path) -> None:
    """The sample sets under the table's names, in a mixture of both; few episodes are all trained on."""
    folders = list(recorded)
    section = table | {"root": str(folders[0].parent), "mixture": "all", "index": str(tmp_path)}
    section["mixtures"] = {"all": {folder.name: 1.0 for folder in folders}}
    pairs, held_out = build_pairs(section, 56), build_pairs(section, 56, "held_out")
    assert list(pairs.sets) == [folder.name for folder in folders]
    for folder in folders:
        lengths = [episode["length"] for episode in recorded[folder]["train"]]
        trained = len(lengths) if "val" in recorded[folder] else round(0.95 * len(lengths))
        trim = sum(table["sets"][folder.name].get("trim", []))
        assert len(pairs.sets[folder.name]) == sum(length - trim for length in lengths[:trained])
    sample = pairs.sample(len(pairs) - 1, np.random.default_rng(0))
    assert sample["frames"].shape == (2, 3, 56, 56) and sample["text"]
    assert len(held_out) > 0
