"""A policy as a model server of vla-eval, asked by vla-eval's own runner; where vla-eval 0.8 is installed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_export import write_run

from defi.engine.data import seed_of
from defi.errors import UserError
from Step3_DeFI.acting import Policy

reason = "vla-eval is not installed: integrations/vla_eval/README.md"
pytest.importorskip("vla_eval", reason=reason)

import vla_eval  # noqa: E402
from vla_eval.benchmarks.base import StepBenchmark, StepResult  # noqa: E402
from vla_eval.model_servers.base import SessionContext  # noqa: E402
from vla_eval.specs import (  # noqa: E402
    GRIPPER_CLOSE_NEG,
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    RAW,
    check_specs,
)

STEPS, RESTART, EXECUTED = 14, 9, 4
TASKS = [{"name": "push the block"}, {"name": "open the drawer"}]
CAMERAS = {"static": "rgb_static", "gripper": "wrist"}
FACTORS = [0.02, 0.02, 0.02, 0.05, 0.05, 0.05, -1.0]


def shown(task: str, episode: int, step: int) -> dict[str, Any]:
    """What a benchmark shows: pictures of noise; halfway the instruction changes."""
    rng = np.random.default_rng([len(task), episode, step])
    images = {name: rng.integers(0, 256, (20, 24, 3), np.uint8) for name in ("wrist", "other", "rgb_static")}
    text = task if step < RESTART else f"now {task}"
    return {"images": images, "task_description": text, "states": rng.normal(size=15)}


class Noise(StepBenchmark):
    """Records the actions that it is given."""

    done: dict[tuple[str, int], list[np.ndarray]] = {}

    def __init__(self, send_state: bool = False, send_wrist_image: bool = False) -> None:
        super().__init__()
        assert send_state and send_wrist_image  # the server asked for them

    def get_tasks(self) -> list[dict[str, Any]]:
        return TASKS

    def reset(self, task: dict[str, Any]) -> int:
        self.now = self.done[task["name"], task["episode_idx"]] = []
        return 0

    def step(self, action: dict[str, Any]) -> StepResult:
        self.now.append(action["actions"])
        return StepResult(len(self.now), 0.0, len(self.now) == STEPS, {})

    def make_obs(self, raw_obs: int, task: dict[str, Any]) -> dict[str, Any]:
        seen = shown(task["name"], task["episode_idx"], raw_obs)
        return seen | ({"episode_restart": True} if raw_obs == RESTART else {})

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": True}

    def get_action_spec(self) -> dict[str, Any]:
        return {"gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, Any]:
        return {"rgb_static": IMAGE_RGB, "wrist": IMAGE_RGB, "language": LANGUAGE, "state": RAW}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "integrations/vla_eval/defi_server.py"
    spec = importlib.util.spec_from_file_location("defi_server", file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("runs"), state=True))


def wanted(policy: Policy, task: str, episode: int) -> list[np.ndarray]:
    """The actions of an episode, from the policy itself."""
    known, left, found = f'{{"episode_idx": {episode}, "name": "{task}"}}', [], []
    for step in range(STEPS):
        if step == RESTART or not left:
            seen = shown(task, episode, step)
            images = {mine: seen["images"][its] for mine, its in CAMERAS.items()}
            given = {"images": images, "instruction": seen["task_description"], "state": seen["states"]}
            left = [*policy.infer(given, seed_of(f"vla-eval {known}", 5, step))[:EXECUTED]]
        found.append(left.pop(0) * np.array(FACTORS, np.float32))
    return found


def test_its_runner_drives_the_policy(module: ModuleType, run: str, monkeypatch, caplog) -> None:
    """Chunks, another instruction within an episode, cameras, units: the policy's own actions, to the bit."""
    monkeypatch.setitem(sys.modules, "noise", sys.modules[__name__])
    server = module.DeFIServer(run, cameras=CAMERAS, factors=FACTORS, seed=5, chunk_size=EXECUTED)
    config = {"benchmarks": [{"benchmark": "noise:Noise", "episodes_per_task": 2}]}
    with vla_eval.serve_background(server) as handle, caplog.at_level("INFO"):
        (result,) = vla_eval.run(config, server_url=handle.url, docker=False, no_save=True)
    assert result["mean_success"] == 1 and len(Noise.done) == 4
    assert "Spec validation passed" in caplog.text  # a gripper of factor −1 closes at 1
    policy = Policy.load(run)
    for (task, episode), actions in Noise.done.items():
        np.testing.assert_array_equal(np.stack(actions), wanted(policy, task, episode))


def test_answers_do_not_depend_on_company(module: ModuleType, run: str) -> None:
    server = module.DeFIServer(run, cameras=CAMERAS, max_batch_size=3)
    contexts = [SessionContext(f"session {i}", "") for i in range(3)]
    for i, context in enumerate(contexts):
        server._episodes[context.session_id] = f"episode {i}"
    seen = [shown("push the block", i, 0) for i in range(3)]
    together = server.predict_batch(seen, contexts)
    for observation, context, answer in reversed(list(zip(seen, contexts, together))):
        np.testing.assert_array_equal(server.predict(observation, context)["actions"], answer["actions"])
    assert not np.array_equal(together[0]["actions"], together[1]["actions"])


def test_roll_pitch_and_yaw_become_a_rotation_vector(module: ModuleType, run: str) -> None:
    plain, turned = (module.DeFIServer(run, cameras=CAMERAS, euler=euler) for euler in (None, 3))
    given = shown("push the block", 0, 0), SessionContext("", "")
    before, after = (each.predict(*given)["actions"] for each in (plain, turned))
    for (x, y, z), vector in zip(before[:, 3:6].astype(float), after[:, 3:6]):
        about_x = [[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]]
        about_y = [[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]]
        about_z = [[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]]
        wanted = np.array(about_z) @ about_y @ about_x
        np.testing.assert_allclose(Rotation.from_rotvec(vector).as_matrix(), wanted, atol=1e-6)
    np.testing.assert_array_equal(np.delete(after, [3, 4, 5], 1), np.delete(before, [3, 4, 5], 1))
    assert np.abs(after - before).max() > 1e-3


def test_what_does_not_fit_is_said(module: ModuleType, run: str) -> None:
    with pytest.raises(UserError, match="cameras: top: no such camera; this policy sees static, gripper"):
        module.DeFIServer(run, cameras={"top": "agentview"})
    with pytest.raises(UserError, match="factors: 2 numbers; give 7: dx, dy"):
        module.DeFIServer(run, factors=[1.0, -1.0])
    server = module.DeFIServer(run, cameras={"gripper": "wrist"})
    with pytest.raises(UserError, match="no camera static among wrist, other, rgb_static; name"):
        server.predict(shown("push", 0, 0), SessionContext("", ""))
    spec = server.get_action_spec()
    assert spec == {"gripper": GRIPPER_CLOSE_NEG}  # CALVIN's robot: 1 opens
    assert check_specs(spec, {"gripper": GRIPPER_CLOSE_POS}, {}, {})
