"""Samples straight from CALVIN's files, and the store that is made of them: the same, from folder and zip."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from policy_fakes import PRESET, build_gfdm, write_demonstrations, write_stages

from defi.calvin import CalvinFolder, frame_name
from defi.config import CONFIG_DIR, compose_preset
from defi.errors import UserError
from Step3_DeFI import prepare as preparation
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.data import ROBOT, SPANS, PolicyStore
from Step3_DeFI.observation import observe
from Step3_DeFI.prepare import Encoder, prepare
from Step3_DeFI.samples import CalvinSamples, plan_samples


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations as a folder and as a zip, and stage 1's run."""
    folder = tmp_path_factory.mktemp("place")
    write_demonstrations(folder / "demos")
    write_stages(folder)
    with zipfile.ZipFile(folder / "demos.zip", "w") as archive:
        for path in sorted(p for p in (folder / "demos").rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))
    return folder


def settings(place: Path, output: Path, root: str, kind: str, **values: Any) -> DictConfig:
    given = {"data.root": place / root, "gfdm_checkpoint": place / "gfdm", "data.tail": 9, "store.kind": kind}
    given |= {"output": output, "store.batch": 4, **values}
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("step3_prepare", [f"{key}={value}" for key, value in given.items()])
    cfg = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)), PRESET)
    OmegaConf.resolve(cfg)
    return cfg


@pytest.mark.parametrize("root", ["demos", "demos.zip"])
def test_store_and_files_yield_the_same_samples(place: Path, tmp_path: Path, root: str) -> None:
    store = PolicyStore(prepare(settings(place, tmp_path / "store", root, "images")))
    raw = CalvinSamples(place / root / "training", image_size=16, tail=9)
    assert len(store) == len(raw) == 6 + 13
    for packed, sample in zip(map(store.__getitem__, range(19)), map(raw.__getitem__, range(19))):
        assert packed.keys() == sample.keys() and packed["text"] == sample["text"]
        assert torch.equal(packed["images"], sample["images"])
        assert torch.equal(packed["actions"], sample["actions"])


def test_latents_are_those_of_the_raw_frames(place: Path, tmp_path: Path) -> None:
    store = PolicyStore(prepare(settings(place, tmp_path / "store", "demos.zip", "latents")))
    data, gfdm = CalvinFolder(place / "demos" / "training"), build_gfdm().eval()
    for i in (0, 7, 18):
        frame = int(np.load(tmp_path / "store" / SPANS)[i, 1])
        expected = gfdm.encode_images(observe(data.frame(frame), 16) / 127.5 - 1)
        torch.testing.assert_close(store[i]["latents"].float(), expected, rtol=1e-3, atol=1e-3)


def test_robot_states_and_spans_are_kept(place: Path, tmp_path: Path) -> None:
    prepare(settings(place, tmp_path / "store", "demos", "images"))
    spans, states = (np.load(tmp_path / "store" / name) for name in (SPANS, ROBOT))
    assert spans.tolist() == [[0, f] for f in range(100, 106)] + [[1, f] for f in range(115, 128)]
    assert states.shape == (19, 15) and states.dtype == np.float32


def test_all_recorded_frames(place: Path, tmp_path: Path) -> None:
    """The annotated samples come first, unchanged; every other frame with a chunk follows, without text."""
    given = {"data.tail": 12, "data.spans": "all"}
    store = PolicyStore(prepare(settings(place, tmp_path / "store", "demos", "images", **given)))
    annotated = [[0, f] for f in range(100, 103)] + [[1, f] for f in range(115, 125)]
    others = [[-1, f] for f in (103, 104, 105, 125, 126, 127)]
    assert np.load(tmp_path / "store" / SPANS).tolist() == annotated + others
    raw = CalvinSamples(place / "demos" / "training", image_size=16, tail=12, spans="all")
    assert len(store) == len(raw) == 19
    for i, (number, frame) in enumerate(annotated + others):
        packed, sample = store[i], raw[i]
        assert packed["text"] == sample["text"] == ("" if number < 0 else f"do thing {number}")
        assert torch.equal(packed["images"], sample["images"])
        assert torch.equal(packed["actions"], sample["actions"])
        assert packed["actions"][:, 0].tolist() == list(range(frame, frame + 10))
    with pytest.raises(UserError, match="data.spans=some"):
        prepare(settings(place, tmp_path / "new", "demos", "images", **{"data.spans": "some"}))
    assert not (tmp_path / "new").exists()


def test_a_frame_of_latents_takes_at_most_17_kb() -> None:
    """Both views, at the sizes of Stable Video Diffusion's autoencoder and 256² pixels."""

    class Sizes:
        config = type("", (), {"latent_size": 256 // 8, "vae": type("", (), {"latent_channels": 4})})

    policy = PolicyConfig.from_preset(compose_preset("paper"))
    encoder = Encoder("latents", 1, 0, Sizes(), policy.feature_noise, torch.device("cpu"))
    assert np.prod(encoder.row_shape(policy, 256)) * np.float16().nbytes <= 17 * 1024


def test_missing_frames_are_named_before_any_work(place: Path, tmp_path: Path) -> None:
    root = write_demonstrations(tmp_path / "demos")
    for frame in (103, 120):
        (root / "training" / frame_name(frame)).unlink()
    with pytest.raises(UserError, match=r"episode_0000103\.npz: missing, and 1 more of the 37 frames"):
        plan_samples(CalvinFolder(root / "training"), chunk=10, tail=9, stride=1, by_text=False)


def test_a_full_disk_is_named_before_any_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparation.os, "posix_fallocate", full)
        with pytest.raises(UserError, match=r"inputs\.npy: cannot take 0\.0 GB \(No space left on device\)"):
            prepare(settings(place, tmp_path / "store", "demos", "images"))
    prepare(settings(place, tmp_path / "store", "demos", "images", resume=True))
    assert len(PolicyStore(tmp_path / "store")) == 19


@pytest.mark.slow
def test_two_processes_make_the_store_of_one(place: Path, tmp_path: Path) -> None:
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m"]
    given = [f"data.root={place / 'demos'}", "data.tail=9", "store.kind=images", "store.batch=4"]
    for name, start in (("one", []), ("two", launch)):
        done = subprocess.run(
            [sys.executable, "-m", *start, "Step3_DeFI.prepare", *given, f"output={tmp_path / name}"],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    for file in ("inputs.npy", "actions.npy", "index.npy", "manifest.json", ROBOT, SPANS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))
