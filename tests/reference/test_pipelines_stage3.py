"""Stage 3's samples, from demonstrations as they are and from a store, beside the published data module's.

`reference/pipelines/stage3.json` holds them for the data set in CALVIN's format beside it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from defi.config import CONFIG_DIR, compose_preset
from Step3_DeFI import adapter
from Step3_DeFI.data import PolicySamples
from Step3_DeFI.observation import CAMERAS, to_unit
from Step3_DeFI.policy import DeFI
from Step3_DeFI.prepare import prepare
from Step3_DeFI.train import open_samples

PRESET = "released"


def settings(command: str, **values: Any) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose(command, [f"preset={PRESET}", *(f"{key}={value}" for key, value in values.items())])
    OmegaConf.resolve(cfg)
    return cfg


@pytest.fixture(scope="module")
def policy() -> DeFI:
    """Only its settings are looked at."""
    with torch.device("meta"):
        return adapter.build(compose_preset(PRESET))


@pytest.fixture(scope="module")
def recorded(reference: Path) -> dict[str, Any]:
    file = reference / "pipelines" / "stage3.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def arrays(reference: Path) -> dict[str, np.ndarray]:
    file = reference / "pipelines" / "stage3_arrays.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with np.load(file) as found:
        return dict(found)


@pytest.fixture(scope="module", params=["training", "validation"])
def split(request: pytest.FixtureRequest, recorded: dict[str, Any], reference: Path) -> str:
    """Its name: recorded, and there to be read."""
    if request.param not in recorded["splits"]:
        pytest.skip(f"nothing recorded of {request.param}")
    if not (reference / "calvin_mini" / request.param).is_dir():
        pytest.skip(f"no {reference}/calvin_mini/{request.param}")
    return request.param


@pytest.fixture(scope="module", params=["root", "store"])
def samples(
    request: pytest.FixtureRequest,
    split: str,
    reference: Path,
    policy: DeFI,
    tmp_path_factory: pytest.TempPathFactory,
) -> PolicySamples:
    """As training opens them, with the settings of the preset."""
    source = {"data.root": reference / "calvin_mini", "data.split": split}
    if request.param == "store":
        output = tmp_path_factory.mktemp("store") / split
        prepare(settings("step3_prepare", **source, **{"store.kind": "images", "output": output}))
        source = {"data.store": output}
    cfg = settings("step3_train", output="unused", **source)
    return open_samples(cfg.data, policy, Path("unused"))["training"]


def test_pipelines_samples_texts_and_actions(
    samples: PolicySamples, split: str, recorded: dict[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    found, rows = recorded["splits"][split], recorded["splits"][split]["rows"]
    assert len(samples) == found["samples"] and len(rows) == found["recorded"]
    actions = arrays[f"{split}_actions"]
    for (number, _, annotation, _), expected in zip(rows, actions, strict=True):
        sample = samples[number]
        assert sample["text"] == found["annotation_texts"][annotation]
        assert sample["actions"].dtype == torch.float32
        np.testing.assert_array_equal(sample["actions"], expected)


def test_pipelines_rows(samples: PolicySamples, split: str, recorded: dict[str, Any]) -> None:
    """Which annotation and which frame a sample is of."""
    store = getattr(samples, "folder", None)
    spans = samples.plan.spans if store is None else np.load(store / "spans.npy")
    for number, start, annotation, frame in recorded["splits"][split]["rows"]:
        assert spans[number].tolist() == [annotation, start] == [annotation, frame]


def test_pipelines_pictures(samples: PolicySamples, split: str, arrays: dict[str, np.ndarray]) -> None:
    """The recorded levels exactly, and what the networks see of them."""
    numbers = {int(name.split("_")[1]) for name in arrays if name.startswith(split) and "rgb" in name}
    if not numbers:
        pytest.skip(f"no pictures recorded of {split}")
    for number in sorted(numbers):
        images = samples[number]["images"]
        for view, camera in enumerate(CAMERAS):
            expected = arrays[f"{split}_{number}_{camera}"].astype(np.float32)
            np.testing.assert_array_equal(images[view], np.round((expected * 0.5 + 0.5) * 255))
            np.testing.assert_allclose(to_unit(images)[view], expected, atol=2**-11)


def test_pipelines_batch(samples: PolicySamples, recorded: dict[str, Any]) -> None:
    published = recorded["batch"]
    static, gripper = (published["rgb_obs"][camera] for camera in CAMERAS)
    size = published["actions"][0]
    batch = next(iter(DataLoader(samples, batch_size=size)))
    assert list(batch["actions"].shape) == published["actions"]
    assert [size, 1, *batch["images"].shape[2:]] == static == gripper
    assert batch["images"].shape[1] == len(CAMERAS) and len(batch["text"]) == size
