"""Robots of any kind: what they see and do in the policy, acting in their units, checks where they meet."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy_fakes import build_policy, policy_config, write_stages

from defi.data.calvin import calvin_robot
from defi.data.motions import Motions, Statistics
from defi.engine import checkpoint
from defi.errors import UserError
from defi.robot.spec import Gripper, Robot, Vector
from Step3_DeFI.acting import Policy
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.config import check_robot


def other_robot(normalisation: str = "bounds") -> Robot:
    """Two joints and a gripper that closes above 0.5, state of two numbers; one camera."""
    rng = np.random.default_rng(0)
    actions = rng.normal((5, -2, 0.5), (0.1, 30, 0.5), (5000, 3)).astype(np.float32)
    state = rng.normal((100, 0), (7, 1e-3), (5000, 2)).astype(np.float32)
    robot = Robot(
        ["wrist"],
        Vector.plain(["a", "b", "grip"]),
        Vector.plain(["u", "v"]),
        fps=10,
        gripper=Gripper(2, threshold=0.5, above=1.0, below=0.0, opens=False),
        executed=4,
    )
    return robot.fitted(Motions(np.arange(5000), actions, state), normalisation)


def other_policy(**changes: Any) -> DeFI:
    return build_policy(robot=asdict(other_robot()), state=True, **changes).eval()


def seen(number: int = 0, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    picture = rng.integers(0, 256, (24, 40, 3), np.uint8)
    return {"images": {"wrist": picture}, "instruction": "push", "state": [100.0, 0.0], **changes}


# ------------------------------------------------------------ the robot


@pytest.mark.parametrize("kind", ["none", "mean_std", "bounds"])
def test_normalisation_goes_in_and_out(kind: str) -> None:
    values = np.random.default_rng(1).normal((5, -2, 0), (0.1, 30, 0), (5000, 3)).astype(np.float32)
    vector = Vector.plain("abc").fitted(Statistics.of(values), [kind] * 3)
    inside = vector.normalise(values)
    np.testing.assert_allclose(vector.restore(inside), values, rtol=1e-5, atol=1e-5)
    tensor = torch.from_numpy(values)
    np.testing.assert_array_equal(vector.normalise(tensor).numpy(), inside)
    assert np.isfinite(inside).all() and (inside[:, 2] == 0).all(), "a constant is no division by zero"
    if kind == "none":
        assert vector.normalise(tensor) is tensor and vector.restore(tensor) is tensor
    elif kind == "mean_std":
        np.testing.assert_allclose(inside[:, :2].std(0), 1, rtol=1e-4)
    else:
        low, high = np.quantile(inside[:, :2], (0.01, 0.99), axis=0)
        np.testing.assert_allclose([low, high], [[-1, -1], [1, 1]], atol=1e-4)


def test_a_plain_vector_takes_what_is_known() -> None:
    known = Vector.plain(["x", "y"], low=[0, -1], high=[2, 1], units=["m", "rad"])
    assert (known.low, known.high, known.units) == ([0, -1], [2, 1], ["m", "rad"])
    for wrong in ({"low": [0], "high": [1]}, {"low": [0, 0]}, {"units": ["m"]}):
        with pytest.raises(UserError, match="^robot: 2 names, but"):
            Vector.plain(["x", "y"], **wrong)


def test_the_gripper_is_not_normalised_and_snaps() -> None:
    robot = other_robot()
    assert robot.actions.normalisation == ["bounds", "bounds", "none"]
    assert robot.state.normalisation == ["bounds", "bounds"]
    snapped = robot.gripper.snap(np.array([[3.0, 4.0, 0.5], [3.0, 4.0, 0.51]]))
    np.testing.assert_array_equal(snapped, [[3, 4, 0], [3, 4, 1]])
    held = Gripper(0, threshold=0.2, held=True).snap(np.array([[0.1], [0.9], [0.0], [-0.5], [0.2]]))
    np.testing.assert_array_equal(held[:, 0], [0, 1, 1, -1, -1])


def test_a_dimension_that_hardly_moves_is_not_blown_up() -> None:
    """98 % of the frames differ by noise alone: the whole range counts; noise alone does not."""
    rng = np.random.default_rng(0)
    values = np.stack([1e-6 * rng.normal(size=4000), 5 + 1e-7 * rng.normal(size=4000)], axis=1)
    values[:30, 0] = 0.5
    for kind in ("bounds", "mean_std"):
        vector = Vector.plain("ab").fitted(Statistics.of(values), [kind] * 2)
        assert np.abs(vector.normalise(values)).max() < 20 and vector.scale[1] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": []}, r"robot.cameras=\[\]: name one or more"),
        ({"cameras": ["a", "a"]}, "none of them twice"),
        ({"fps": -1.0}, "robot.fps=-1.0: must be"),
        ({"executed": 0}, "robot.executed=0: must be 1 or more"),
        ({"gripper": {"dimension": 7}}, r"gripper.dimension=7: must lie in 0 … 6"),
        ({"actions": {"scale": [1.0]}}, "7 names, but lists of"),
        ({"actions": {"scale": [0.0] * 7}}, "scale more than 0"),
        ({"actions": {"offset": [float("nan")] * 7}}, "must be finite"),
        (
            {"actions": {"normalisation": ["some"] * 7}},
            "normalisation=some: choose from none, mean_std, bounds",
        ),
    ],
)
def test_a_robot_that_is_none_is_one_line(change: dict[str, Any], message: str) -> None:
    values = asdict(calvin_robot())
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        policy_config(robot=values)


def test_what_differs_is_named() -> None:
    mine, its = calvin_robot(), calvin_robot(["static"])
    assert mine.differences(calvin_robot()) == []
    its.fps, its.gripper = 10.0, Gripper(dimension=6, opens=False)
    its.actions.units[0], its.actions.units[1] = "m", ""  # the second is unknown
    its.state.names[0] = "joint_0"
    found = mine.differences(its)
    assert [each.split()[0] for each in found] == ["cameras", "actions:", "state:", "30", "gripper"]
    assert "dx relative in 0.02 m, not relative in m" in found[1] and "dy" not in found[1]
    its = other_robot()
    assert any("7 ['dx'" in each and "not 3 ['a', 'b', 'grip']" in each for each in mine.differences(its))


def test_settings_change_what_the_data_say() -> None:
    policy = asdict(policy_config()) | {"robot": {"executed": 5, "fps": 15}}
    robot = PolicyConfig.from_preset({"policy": policy}, calvin_robot()).robot
    assert (robot.executed, robot.fps, robot.actions) == (5, 15, calvin_robot().actions)
    for key in ("views", "action_dim"):
        with pytest.raises(UserError, match=f"policy.{key}=2: no longer a setting; the data say"):
            PolicyConfig.from_preset({"policy": asdict(policy_config()) | {key: 2}}, calvin_robot())


# ------------------------------------------------------------ in the policy


def test_a_policy_of_another_robot_learns_in_its_units() -> None:
    """Constant chunks of very different sizes are learned alike, and come back in the robot's units."""
    policy = other_policy(diffusion={"draws": 8}).train()
    batch = policy.config.fake_batch(2)
    assert batch["actions"].shape == (2, 10, 3) and batch["state"].shape == (2, 2)
    wanted = torch.tensor([[5.1, 20.0, 1.0], [4.9, -30.0, 0.0]])[:, None].repeat(1, 10, 1)
    optimizer = torch.optim.Adam([p for _, p in policy.trainable()], lr=3e-3)
    for step in range(300):
        loss = policy(batch | {"actions": wanted, "seed": torch.arange(2) + 2 * step})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    error = policy.config.robot.actions.normalise(
        policy.predict(batch)
    ) - policy.config.robot.actions.normalise(wanted)
    assert error.square().mean() < 0.02, error


def test_the_state_is_a_token_that_has_a_say() -> None:
    policy = other_policy()
    features, noise = policy.config.fake_batch(2)["features"], torch.randn(2, 10, 3)
    given = {"noise": noise, "state": torch.tensor([[100.0, 0.0]] * 2)}
    base = policy.act_on_features(features, ["push"] * 2, **given)
    other = policy.act_on_features(features, ["push"] * 2, noise=noise, state=given["state"] + 7)
    assert not torch.allclose(base, other)
    memory = policy.encode(policy.context(features, ["push"] * 2, given["state"]))
    without = build_policy(robot=asdict(other_robot())).eval()
    assert memory[0][0].shape[2] == 1 + without.encode(without.context(features, ["push"] * 2))[0][0].shape[2]
    loss = policy(policy.config.fake_batch(2))["loss"]
    loss.backward()
    assert policy.action_head.embed_state[0].weight.grad.abs().sum() > 0
    guided = other_policy(diffusion={"text_dropout": 0.5, "guidance": 2.0})
    assert guided.act_on_features(features, ["push"] * 2, **given).shape == (2, 10, 3)


def test_a_state_that_the_data_lack_is_refused() -> None:
    robot = replace(calvin_robot(), state=None)
    with pytest.raises(UserError, match="^policy.state=True: these data hold no state; leave it at false$"):
        policy_config(robot=asdict(robot), state=True)
    with pytest.raises(UserError, match="policy.robot=None: give the robot of the data"):
        build_policy(robot=None)


# ------------------------------------------------------------ acting


def test_actions_come_in_robot_units_with_the_gripper_snapped() -> None:
    acting = Policy(other_policy())
    chunk = acting.infer(seen(), seed=3)
    assert chunk.shape == (10, 3) and chunk.dtype == np.float32
    assert set(np.unique(chunk[:, 2])) <= {0.0, 1.0}
    robot, model = acting.robot, acting.model
    noise = model.noise(torch.tensor([3]))
    images = torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8)
    raw = model.act(images, ["push"], noise=noise, state=torch.tensor([[100.0, 0.0]]))
    plain = replace(robot, actions=Vector.plain(robot.actions.names))
    model.config.robot = plain
    inside = model.act(images, ["push"], noise=noise, state=torch.tensor([[100.0, 0.0]]))
    torch.testing.assert_close(raw, robot.actions.restore(inside))


def test_the_same_seed_gives_the_same_actions_whatever_is_beside() -> None:
    acting = Policy(other_policy())
    base = acting.infer(seen(1), seed=5)
    np.testing.assert_array_equal(acting.infer(seen(1), seed=5), base)
    assert not np.allclose(acting.infer(seen(1), seed=6), base)
    batches = [acting.infer_batch([seen(n), seen(1)], [n, 5])[1] for n in (2, 3)]
    np.testing.assert_array_equal(*batches)
    np.testing.assert_allclose(batches[0], base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": {"static": np.zeros((4, 4, 3), np.uint8)}},
            "no picture of the camera wrist; .* sees wrist",
        ),
        ({"images": {"wrist": np.zeros((4, 4, 3))}}, r"picture of wrist is float64 \[4, 4, 3\]; give uint8"),
        (
            {"images": {"wrist": np.zeros((3, 4, 4), np.uint8)}},
            r"is uint8 \[3, 4, 4\]; give uint8 \[H, W, 3\]",
        ),
        ({"images": {"wrist": np.zeros((0, 4, 3), np.uint8)}}, r"is uint8 \[0, 4, 3\]"),
        ({"images": {"wrist": "a.png"}}, r"picture of wrist is str \[\]"),
        ({"state": [1.0]}, r"state is float64 \[1\]; give 2 finite numbers: u, v"),
        ({"state": [1.0, float("nan")]}, "give 2 finite numbers"),
        ({"state": [1.0, 1e300]}, "give 2 finite numbers"),
        ({"state": ["1", "2"]}, "give 2 finite numbers"),
        ({"state": None}, "give 2 finite numbers"),
        ({"instruction": None}, "no instruction; give a sentence"),
    ],
)
def test_an_observation_that_does_not_fit_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^observation: .*{message}") as caught:
        Policy(other_policy()).infer(seen(**change))
    assert "\n" not in str(caught.value)


def test_a_robot_survives_its_checkpoint_and_meets_the_simulator(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gfdm, gidm = write_stages(tmp_path)
    config = policy_config(robot=asdict(other_robot()), state=True)
    policy = DeFI.from_stages(config, gfdm=gfdm, gidm=gidm)
    checkpoint.save(policy, tmp_path / "run", step=1, config={"preset_name": "test"})
    loaded = Policy.load(tmp_path / "run")
    assert loaded.robot == other_robot()
    np.testing.assert_array_equal(loaded.infer(seen(), 1), Policy(policy).infer(seen(), 1))
    with pytest.raises(UserError) as caught:
        check_robot(loaded.model.config, calvin_robot(), "run")
    for part in ("no camera wrist", "actions of 7 numbers, not 3", "state of 15 numbers, not 2"):
        assert part in str(caught.value)
    check_robot(policy_config(), calvin_robot(), "fits")
    assert not capsys.readouterr().out
    slower = replace(calvin_robot(["static"]), fps=10.0)
    differ = check_robot(policy_config(robot=asdict(slower)), calvin_robot(), "slower")
    assert differ == ["10 steps per second, not 30"]
    assert "slower: its robot is not quite the simulators': 10 steps per second" in capsys.readouterr().out
