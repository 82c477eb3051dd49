"""Policies in starVLA: the run folder that is exported, and the framework in a checkout of starVLA.

The second needs that checkout, named by STARVLA_ROOT, and its requirements: integrations/starvla/README.md.
"""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from serving import serving
from test_export import export, write_run

from defi.data.calvin import calvin_robot
from defi.engine.checkpoint import find_weights
from defi.engine.data import seed_of
from defi.robot.spec import Vector
from Step3_DeFI.acting import Policy
from Step3_DeFI.policy import DeFI

ROOT = Path(__file__).resolve().parents[1]
NAME, SEEDS = "pushes", [3, 2**40]


def normalised_robot() -> Any:
    """CALVIN's, with actions in millimetres say, each dimension normalised in another way."""
    robot = replace(calvin_robot(), executed=6)
    kinds = ["mean_std", "bounds", "none", "mean_std", "bounds", "mean_std", "none"]
    robot.actions = Vector(
        robot.actions.names,
        robot.actions.units,
        robot.actions.relative,
        kinds,
        [0.3, -250.0, 0.0, 1e-3, 7.1, -0.02, 0.0],
        [0.07, 31.7, 1.0, 2e-4, 3.3, 0.9, 1.0],
    )
    robot.state.offset, robot.state.scale = [0.5] * 15, [2.0] * 15
    robot.state.normalisation = ["mean_std"] * 15
    return robot


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs", robot=normalised_robot(), state=True)


@pytest.fixture
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    export(monkeypatch, f"checkpoint={run}", f"output={tmp_path / NAME}", "format=starvla")
    return tmp_path / NAME


def examples(policy: Policy, count: int = 2) -> list[dict[str, Any]]:
    """As starVLA's clients send them, pictures of several sizes."""
    rng = np.random.default_rng(0)
    return [
        {
            "image": [
                rng.integers(0, 256, (20, 24 + i, 3), np.uint8) for i, _ in enumerate(policy.robot.cameras)
            ],
            "lang": f"push block {number}",
            "state": rng.normal(size=(1, 15)).astype(np.float32),
            "action": rng.normal(size=(12, 7)).astype(np.float32),
        }
        for number in range(count)
    ]


def observations(policy: Policy, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Examples as the policy takes them."""
    return [
        {
            "images": dict(zip(policy.robot.cameras, each["image"])),
            "instruction": each["lang"],
            "state": each["state"][0],
        }
        for each in given
    ]


def expected(policy: Policy, given: list[dict[str, Any]]) -> np.ndarray:
    """What the policy itself does, in the robot's units."""
    return policy.infer_batch(observations(policy, given), SEEDS)


# ------------------------------------------------------------ the folder


def test_the_folder_is_a_run_of_starvla_and_a_policy(folder: Path, run: Path) -> None:
    policy = Policy.load(run)
    wanted = expected(policy, examples(policy))
    np.testing.assert_array_equal(expected(Policy.load(folder), examples(policy)), wanted)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "checkpoints",
        "config.yaml",
        "dataset_statistics.json",
        "defi",
    }
    settings = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert settings["framework"] == {
        "name": "DeFI",
        "policy": f"results/Checkpoints/{NAME}",
        "precision": None,
        "action_model": {"action_dim": 7, "action_horizon": 6, "state_dim": 15},
    }
    assert Path(settings["run_root_dir"], settings["run_id"]) == Path(settings["framework"]["policy"])
    assert settings["datasets"]["vla_data"]["data_mix"] == NAME and settings["trainer"] == {}
    weights = load_file(folder / "checkpoints" / "model.safetensors")
    own = DeFI.from_pretrained(find_weights(run)).own_state()
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".yaml", ".md"):
            assert str(folder.parent) not in file.read_text(), file


def test_each_rule_of_starvla_gives_the_robots_units(folder: Path) -> None:
    actions = Policy.load(folder).robot.actions
    found = json.loads((folder / "dataset_statistics.json").read_text())[NAME]["action"]
    mean, std, low, high = (np.array(found[key], np.float32) for key in ("mean", "std", "q01", "q99"))
    normalised = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    wanted = actions.restore(normalised)
    np.testing.assert_array_equal(normalised * std + mean, wanted)  # what the framework asks for
    bounds = (normalised + 1) / 2 * (high - low) + low
    np.testing.assert_allclose(bounds, wanted, rtol=1e-5, atol=1e-5)
    assert found["min"] == found["q01"] and found["max"] == found["q99"] and found["mask"] == [True] * 7


# ------------------------------------------------------------ in starVLA


@pytest.fixture(scope="session")
def framework() -> ModuleType:
    """The framework's file, as starVLA imports it."""
    if "STARVLA_ROOT" not in os.environ:
        pytest.skip("STARVLA_ROOT names no checkout of starVLA")
    sys.path.insert(0, os.environ["STARVLA_ROOT"])
    spec = importlib.util.spec_from_file_location(
        "defi_framework", ROOT / "integrations/starvla/defi_framework.py"
    )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        pytest.skip(f"starVLA's requirements are not installed: {error}")
    return module


def test_starvla_trains_it_and_acts_as_it_does(framework: ModuleType, folder: Path, run: Path) -> None:
    from deployment.model_server.policy_wrapper import PolicyServerWrapper
    from starVLA.model.framework.base_framework import build_framework

    settings = OmegaConf.load(folder / "config.yaml")
    settings.framework.policy = str(folder)
    model, policy = build_framework(settings).train(), Policy.load(run)
    given = examples(policy)
    torch.manual_seed(0)
    loss = model.compute_loss("vla", given)["action_loss"]
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert torch.isfinite(loss) and all(p.grad is not None and p.grad.any() for p in trained.values())
    assert not any(name.startswith(("model.gfdm", "model.t5")) for name in trained)

    # The same loss from the policy itself, of actions in the robot's units.
    torch.manual_seed(0)
    seeds, robot = torch.randint(framework.SEEDS, (2,)), policy.robot
    batch = {
        "images": torch.stack(
            [framework.observe(dict(zip(robot.cameras, each["image"])), robot.cameras, 16) for each in given]
        ),
        "text": [each["lang"] for each in given],
        "actions": torch.from_numpy(
            np.stack([robot.actions.restore(each["action"][-10:]) for each in given])
        ),
        "state": torch.from_numpy(np.concatenate([each["state"] for each in given])),
        "seed": seeds,
    }
    torch.testing.assert_close(policy.model.train()(batch)["loss"], loss, rtol=1e-4, atol=1e-5)

    override = [f"framework.policy={folder}"]
    server = PolicyServerWrapper(
        str(folder / "checkpoints" / "model.safetensors"), device="cpu", config_overrides=override
    )
    assert server.metadata["action_chunk_size"] == 6
    assert server.metadata["action_keys"] == [f"action.{name}" for name in robot.actions.names]
    actions, wanted = server.predict_action(given, seeds=SEEDS)["actions"], expected(Policy.load(run), given)
    np.testing.assert_allclose(actions, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(
        actions[..., [2, 6]], wanted[..., [2, 6]]
    )  # not normalised: to the last bit


def test_starvla_saves_and_loads_what_it_trained(framework: ModuleType, folder: Path) -> None:
    from safetensors.torch import save_file
    from starVLA.model.framework.base_framework import baseframework

    override = [f"framework.policy={folder}"]
    file = folder / "checkpoints" / "model.safetensors"
    model = baseframework.from_pretrained(str(file), config_overrides=override)
    given = examples(model.acting)
    first = model.predict_action(given, SEEDS)["normalized_actions"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    saved = file.with_name("later.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, saved)
    later = baseframework.from_pretrained(str(saved), config_overrides=override)
    found, again = (each.predict_action(given, SEEDS)["normalized_actions"] for each in (model, later))
    np.testing.assert_array_equal(again, found)
    assert not np.array_equal(found, first)
    with pytest.raises(framework.UserError, match="checkpoint: lacks video_former.queries"):
        model.load_state_dict({})
    override = ["framework.policy=results/nowhere"]
    with pytest.raises(
        framework.UserError, match="framework.policy=results/nowhere: .*give the exported folder"
    ):
        baseframework.from_pretrained(str(file), config_overrides=override)


def test_starvlas_own_client_asks_our_server(framework: ModuleType, folder: Path) -> None:
    from deployment.model_server.tools.websocket_policy_client import WebsocketClientPolicy

    policy = Policy.load(folder)
    given, seen = examples(policy), observations(policy, examples(policy))
    with serving(policy, api_key="sesame") as (address, _):
        host, port = address.removeprefix("ws://").split(":")
        client = WebsocketClientPolicy(host, int(port), api_key="sesame")
        assert client.get_server_metadata()["action_chunk_size"] == 6
        for turn in range(2):
            answer = client.predict_action({"examples": given, "do_sample": False, "use_ddim": True})
            assert answer["ok"] and answer["status"] == "ok"
            for number, actions in enumerate(answer["data"]["actions"]):
                wanted = policy.infer(seen[number], seed_of("serve", 0, 0, 2 * turn + number))
                np.testing.assert_array_equal(actions, wanted)
        client.close()
