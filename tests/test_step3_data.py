"""From demonstrations to the policy's store, and from the store to a trained policy."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from policy_fakes import PRESET, policy_config, recorded, write_demonstrations, write_stages
from torch.utils.data import default_collate

from defi.config import CONFIG_DIR
from defi.data.calvin import CAMERAS, CalvinFolder, frame_name
from defi.engine.checkpoint import find_weights, read_manifest
from defi.engine.data import seed_of
from defi.engine.log import read_metrics
from defi.errors import UserError
from Step3_DeFI import prepare as preparation
from Step3_DeFI.features import imagine
from Step3_DeFI.observation import observe
from Step3_DeFI.policy import DeFI
from Step3_DeFI.prepare import prepare
from Step3_DeFI.store import PolicyStore
from Step3_DeFI.train import train_policy

CHUNK = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations and both stages' runs."""
    folder = tmp_path_factory.mktemp("place")
    write_demonstrations(folder / "demos")
    write_stages(folder)
    return folder


def settings(command: str, **values: Any) -> DictConfig:
    """The command's configuration at the tests' sizes."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose(command, [f"{key}={value}" for key, value in values.items()])
    cfg = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)), PRESET)
    OmegaConf.resolve(cfg)
    return cfg


def prepare_settings(place: Path, output: Path, **values: Any) -> DictConfig:
    given = {"data.root": place / "demos", "gfdm_checkpoint": place / "gfdm", "data.min_remaining": 9}
    return settings("step3_prepare", output=output, **(given | values))


def train_settings(place: Path, output: Path, store: Path, **values: Any) -> DictConfig:
    given = {"gfdm_checkpoint": place / "gfdm", "gidm_checkpoint": place / "gidm", "data.store": store}
    trainer = {"global_batch": 4, "max_steps": 4, "save_every": 2, "preview_every": 2, "log_every": 1}
    trainer |= {"schedule": "constant"}  # the same for any max_steps
    given |= {f"trainer.{key}": value for key, value in trainer.items()} | {"shown": 3}
    return settings("step3_train", output=output, **(given | values))


# ------------------------------------------------------------ samples


@pytest.mark.parametrize(("rest", "stride", "expected"), [(9, 1, 6 + 13), (9, 4, 2 + 4), (21, 1, 0 + 1)])
def test_sample_positions(place: Path, rest: int, stride: int, expected: int) -> None:
    """Spans are (100, 114) and (115, 136); sample i has the actions of frames i … i + 9."""
    plan = recorded(place / "demos", rest, stride=stride)
    starts = (plan.data.starts[plan.starts[:, 0]] + plan.starts[:, 1]).tolist()
    assert len(starts) == expected == sum(plan.tasks.values())
    assert starts == [frame for s, e in ((100, 114), (115, 136)) for frame in range(s, e + 1 - rest, stride)]
    first = torch.stack([plan[i]["actions"][:, 0] for i in range(len(plan))])
    assert np.allclose(1000 * first, np.array(starts)[:, None] + np.arange(CHUNK))


def test_spans_without_samples_are_told(place: Path, capsys) -> None:
    """Spans are (100, 114) and (115, 136)."""
    data = CalvinFolder(place / "demos" / "training")
    for min_remaining, told in (
        (14, ""),
        (
            15,
            f"{data.folder}: 1 of 2 episodes are too short for data.min_remaining=15: left out; "
            f"tasks without any sample: {data.spans[0].task}; data.min_remaining=9 takes 1 of them",
        ),
    ):
        recorded(place / "demos", min_remaining)
        assert capsys.readouterr().out.strip() == told


def test_every_action_of_a_chunk_must_exist(place: Path) -> None:
    with pytest.raises(UserError, match="data.min_remaining=8: a chunk has 10 actions"):
        recorded(place / "demos", 8)
    with pytest.raises(UserError, match="no episode is longer than data.min_remaining=30"):
        recorded(place / "demos", 30)


def test_views_are_resized_alike() -> None:
    """A constant picture stays constant; a picture of the wanted size is untouched; static comes first."""
    grey = np.full((20, 20, 3), 77, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    views = observe({"gripper": noise, "static": grey}, ["static", "gripper"], 16)
    assert views.shape == (2, 3, 16, 16) and views.dtype == torch.uint8
    assert (views[0] == 77).all()
    assert np.array_equal(views[1].permute(1, 2, 0).numpy(), noise)


# ------------------------------------------------------------ stores


@pytest.mark.parametrize("kind", ["images", "latents", "features"])
def test_a_store_holds_what_the_policy_would_compute(place: Path, tmp_path: Path, kind: str) -> None:
    prepare(prepare_settings(place, tmp_path / "store", **{"store.kind": kind, "store.batch": 4}))
    store = PolicyStore(tmp_path / "store")
    assert len(store) == 19
    sample = store[7]  # second span, second start
    data = CalvinFolder(place / "demos" / "training")
    assert sample["text"] == "do thing 1"
    assert torch.allclose(1000 * sample["actions"][:, 0], torch.arange(116.0, 126.0))
    assert torch.allclose(1000 * sample["actions"][0, :6], 116 + torch.arange(6) / 10)

    images = observe(data.frame(116), CAMERAS.values(), 16)
    policy = DeFI.from_stages(policy_config(), gfdm=place / "gfdm", gidm=place / "gidm").eval()
    latents = policy.gfdm.encode_images(images / 127.5 - 1)
    if kind == "images":
        assert torch.equal(sample["images"], images)
    elif kind == "latents":
        torch.testing.assert_close(sample["latents"].float(), latents, rtol=2e-3, atol=2e-3)
    else:
        noise = policy.noise(torch.tensor([seed_of("store", 0, 7, 0)])).video  # run's seed, row, draw
        features = imagine(policy.gfdm, latents[None], ["do thing 1"], noise=noise)
        torch.testing.assert_close(sample["features"].float(), features[0], rtol=5e-3, atol=5e-3)
    batch = default_collate([store[0], store[18]]) | {"seed": torch.arange(2)}
    assert torch.isfinite(policy(batch)["loss"])


def test_draws_are_samples_of_their_own(place: Path, tmp_path: Path) -> None:
    prepare(prepare_settings(place, tmp_path / "store", **{"store.draws": 2}))
    store = PolicyStore(tmp_path / "store")
    assert len(store) == 38
    assert torch.equal(store[0]["actions"], store[1]["actions"])
    assert not torch.equal(store[0]["features"], store[1]["features"])


def test_an_interrupted_preparation_goes_on(place: Path, tmp_path: Path, monkeypatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    values = {"store.kind": "features", "store.batch": 4}
    prepare(prepare_settings(place, whole, **values))

    encode, calls = preparation.Encoder.__call__, []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, *args)

    monkeypatch.setattr(preparation.Encoder, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(prepare_settings(place, broken, **values))
    with pytest.raises(UserError, match="not finished; run Step3_DeFI.prepare again with resume=true"):
        PolicyStore(broken)
    with pytest.raises(UserError, match=r"with other data or settings \(seed 0, not 1\); .*another output="):
        prepare(prepare_settings(place, broken, **values, seed=1, resume=True))
    again = {"data.root": os.path.relpath(place / "demos")}  # the same data by another path
    prepare(prepare_settings(place, broken, **values, **again, resume=True))
    assert len(calls) == 3 + 3  # 19 observations in batches of 4: the third died, three were left
    manifest, expected = (json.loads((run / "manifest.json").read_text()) for run in (broken, whole))
    assert manifest.pop("source") == f"{again['data.root']}/training"
    assert manifest.items() <= expected.items()
    for file in ("inputs.npy", "actions.npy", "state.npy", "index.npy", "starts.npy"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes(), file
    prepare(prepare_settings(place, broken, **values, resume=True))
    assert len(calls) == 6, "a complete store stays as it is"
    del expected["robot"]
    (broken / "manifest.json").write_text(json.dumps(expected))
    with pytest.raises(UserError, match="of an older version, which did not note the robot"):
        PolicyStore(broken)


def test_a_store_goes_on_with_the_clips_it_was_begun_with(place: Path, tmp_path: Path) -> None:
    values = {"store.kind": "images", "store.videos": True}
    cfg = prepare_settings(place, tmp_path / "store", **values, resume=True)
    prepare(cfg)
    cfg.gfdm.frames += 1
    with pytest.raises(UserError, match=r"with other data or settings \(rows \d+, not \d+\)"):
        prepare(cfg)


def test_preparation_refuses_bad_input(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    for values, message in (
        ({"data.root": tmp_path / "none"}, "none.*no such folder"),
        ({"gfdm_checkpoint": tmp_path / "none"}, "no checkpoint here"),
        ({"gfdm_checkpoint": place / "gidm"}, "holds a gidm checkpoint, not gfdm"),
        ({"store.kind": "pixels"}, "store.kind=pixels: choose one of features, latents, images"),
        ({"store.kind": "latents", "store.draws": 2}, "store.draws=2"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(prepare_settings(place, output, **values))
        assert not output.exists()


def test_a_truncated_frame_is_named(tmp_path: Path, place: Path) -> None:
    root = write_demonstrations(tmp_path / "demos")
    frame = root / "training" / frame_name(117)
    frame.write_bytes(frame.read_bytes()[:100])
    with pytest.raises(UserError, match="episode_0000117.npz: cannot be read"):
        prepare(prepare_settings(place, tmp_path / "store", **{"data.root": root, "store.kind": "images"}))


# ------------------------------------------------------------ training


def test_train_from_a_store(place: Path, tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    prepare(prepare_settings(place, store))
    train_policy(train_settings(place, run, store, **{"data.held_out": store, "trainer.ema": 0.9}))
    assert read_manifest(run, "policy")["data"]["fingerprint"] == PolicyStore(store).fingerprint
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "preview"]
    assert {"training_action_error", "held_out_action_error", "training_gripper_right"} <= records[0].keys()
    assert (run / "previews" / "step_00000002" / "training.png").stat().st_size > 1000
    policy = DeFI.from_pretrained(find_weights(run, "policy"))
    pictures = torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8)
    assert policy.act(pictures, ["open the drawer"], noise=policy.noise(torch.zeros(1).long())).shape == (
        1,
        10,
        7,
    )


def test_training_resumes_exactly(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare(prepare_settings(place, store, **{"store.kind": "latents"}))
    train_policy(train_settings(place, tmp_path / "whole", store))
    train_policy(train_settings(place, tmp_path / "parts", store, **{"trainer.max_steps": 2}))
    train_policy(train_settings(place, tmp_path / "parts", store, resume=True))
    ends = [find_weights(tmp_path / run, "policy") / "model.safetensors" for run in ("whole", "parts")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_training_refuses_a_store_of_other_sizes(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prepare(prepare_settings(place, store))
    manifest = json.loads((store / "manifest.json").read_text())
    for changes, message in (
        ({"chunk": 5}, r"prepared with chunk=5, the policy has 10|actions.npy: has shape"),
        ({"stage1_weights": "0" * 16}, "prepared with stage1_weights=0000000000000000, the policy has"),
        ({"feature_noise": "fixed"}, "prepared with feature_noise=fixed, the policy has fresh"),
        ({"gfdm_precision": "fp16"}, "prepared with gfdm_precision=fp16, the policy has no"),
        ({"image_size": 32}, "prepared with image_size=32, the policy has 16"),
    ):
        (store / "manifest.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(UserError, match=message):
            train_policy(train_settings(place, tmp_path / "run", store))
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no prepared data here; make it with Step3_DeFI.prepare"):
        train_policy(train_settings(place, tmp_path / "run", tmp_path))
