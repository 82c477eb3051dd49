"""Open loop: figures are exact, each broken convention is named and nothing else is, sound data pass."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from defi.data.motions import Motions, Statistics
from defi.robot.open_loop import Laid, OpenLoop, out_of_range
from defi.robot.spec import Gripper, Robot, Vector

NAMES = ["x", "y", "z", "yaw", "still", "grip"]
CHUNK, LENGTH, GRIP, BEFORE = 10, 60, 5, 10
Truth = list[np.ndarray]  # of episodes, more than three times as long as what is recorded


def slowly(rng: np.random.Generator, steps: int, width: int = 4) -> np.ndarray:
    """Numbers [steps, width] of deviation 1 that change over about ten steps."""
    noise = rng.normal(size=(steps + 40, width))
    bell = np.exp(-np.square(np.arange(-20, 21) / 5))
    return np.stack(
        [np.convolve(each, bell / np.sqrt(np.square(bell).sum()), "valid") for each in noise.T], 1
    )


def truth(seed: int, *, episodes: int = 16, absolute: bool = False) -> Truth:
    found = []
    for number in range(episodes):
        rng = np.random.default_rng([seed, number])
        arm = slowly(rng, 3 * LENGTH + CHUNK + BEFORE)
        arm = np.cumsum(arm, axis=0) + [3, 0, -2, 1] if absolute else arm * [0.01, 0.02, 0.02, 0.5]
        grip = np.where(slowly(rng, len(arm), 1) > 0, 1.0, -1.0)
        found.append(np.hstack([arm, np.zeros((len(arm), 1)), grip]))
    return found


def robot_of(found: Truth) -> Robot:
    """Trained on these numbers."""
    vector, values = Vector.plain(NAMES), np.concatenate(found)
    robot = Robot(["top"], vector, gripper=Gripper(GRIP), fps=20)
    return robot.fitted(Motions(np.arange(len(values)), values, values[:, :0]), "bounds")


def lay(
    found: Truth,
    recorded: Callable[[np.ndarray], np.ndarray] = lambda true: true,
    *,
    every: int = CHUNK,
    at: Callable[[np.ndarray], np.ndarray] = lambda steps: steps,
    late: int = 0,
    skill: float = 0.8,
    mean: bool = False,
    seed: int = 0,
    shown: int | None = None,
) -> OpenLoop:
    """A policy that says the truth with some `skill`, or its mean, over what was recorded of it.

    at: where the recorded steps lie in the truth, which the policy sees and goes on from at its own rate;
    late: how many steps later than they were done actions are recorded.
    """
    every_truth, laid = np.concatenate(found), []
    middle, deviation = every_truth.mean(0), every_truth.std(0)
    for number, true in enumerate(found):
        rng, looks = np.random.default_rng([seed, number, 1]), np.arange(0, LENGTH, every)
        steps = BEFORE + at(looks)[:, None] + np.arange(CHUNK)
        noise = np.stack([slowly(rng, CHUNK, 6) for _ in looks]) * deviation * np.sqrt(1 - skill**2)
        chunks = middle + skill * (true[steps] - middle) + noise * (not mean)
        chunks = chunks.clip(every_truth.min(0), every_truth.max(0))
        chunks[..., GRIP] = np.where(rng.uniform(size=steps.shape) < 0.9, 1, -1) * true[steps][..., GRIP]
        done = recorded(true[BEFORE - late + at(np.arange(LENGTH))])
        laid.append(Laid(str(number), done.astype(np.float32), looks, chunks.astype(np.float32)))
    usual = Statistics.of(np.concatenate([each.recorded for each in laid]))
    return OpenLoop(robot_of(found), laid[:shown], usual)


# ------------------------------------------------------------ figures


def test_errors_are_those_of_the_actions_that_would_be_carried_out() -> None:
    recorded = np.array([[0, 1], [1, 1], [2, -1], [3, -1], [4, -1]], np.float32)
    chunks = np.zeros((2, 4, 2), np.float32)
    chunks[0, :, 0], chunks[1, :, 0] = [0.5, 1, 2, 9], [3, 9, 9, 9]
    chunks[..., 1], chunks[0, :3, 1] = -1, [1, 1, 1]
    robot = Robot(["top"], replace(Vector.plain(["x", "grip"]), units=["m", ""]), gripper=Gripper(1))
    loop = OpenLoop(robot, [Laid("a", recorded, np.array([0, 3]), chunks)], Statistics.of(recorded))
    np.testing.assert_array_equal(loop.predicted[:, 0], [0.5, 1, 2, 3, 9])
    found = loop.errors()
    x, span = found["dimensions"][0], 4 * 0.98
    assert (x["name"], x["unit"]) == ("x", "m")
    assert x["rmse"] == pytest.approx(np.sqrt((0.25 + 25) / 5)) and x["mae"] == pytest.approx(5.5 / 5)
    assert x["rmse_of_range"] == pytest.approx(x["rmse"] / span) == pytest.approx(found["of_range"]["policy"])
    assert x["mean_action_rmse"] == pytest.approx(np.sqrt(2))
    # Before the first look nothing is known: the mean action; at the second, that of step 2.
    assert x["last_action_rmse"] == pytest.approx(np.sqrt((4 + 1 + 0 + 1 + 4) / 5))
    places = np.array(found["places"]["policy"]) * span
    np.testing.assert_allclose(places, np.sqrt([0.25 / 2, 25 / 2, 0, 36]), atol=1e-6)
    assert found["gripper"]["agreement"] == 0.8 and found["gripper"]["switches"] == {
        "predicted": 1, "recorded": 1, "found": 1,
    }  # fmt: skip
    assert found["gripper"]["late"] == found["gripper"]["off"] == 1


def test_a_gripper_that_holds_is_carried_on_before_it_is_compared() -> None:
    command = np.array([0, 1, 0, 0, -1, 0, 0, 0], np.float32)[:, None]
    robot = Robot(["top"], Vector.plain(["grip"]), gripper=Gripper(0, threshold=0.5, held=True))
    said = np.array([[0, 0, 1, 0], [0, -1, 0, 0]], np.float32)[..., None]
    loop = OpenLoop(robot, [Laid("a", command, np.array([0, 4]), said)], Statistics.of(command))
    assert loop.gripper["agreement"] == 6 / 8 and loop.gripper["opposite"] == 1 / 8
    assert (
        loop.gripper["switches"] == {"predicted": 2, "recorded": 2, "found": 2} and loop.gripper["late"] == 1
    )
    assert loop.warnings() == [] and loop.errors()["places"]["policy"] == []


# ------------------------------------------------------------ conventions


@pytest.mark.parametrize("absolute", [False, True], ids=["changes", "places"])
@pytest.mark.parametrize(
    "kind", [{"skill": 0.9}, {"skill": 0.4}, {"skill": 0.6, "mean": True}, {"skill": 0.02}], ids=str
)
def test_sound_data_pass(kind: dict, absolute: bool) -> None:
    for seed in range(12):
        for every in (CHUNK, 3):
            loop = lay(truth(seed, absolute=absolute), every=every, seed=seed, **kind)
            assert loop.warnings() == loop.hints() == [], (seed, every)


def one(column: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def changed(true: np.ndarray) -> np.ndarray:
        true = true.copy()
        true[:, column] = change(true[:, column])
        return true

    return changed


FAULTS: dict[str, tuple[dict, list[str]]] = {
    "sign": ({"recorded": one(1, lambda y: -y)}, ["y: predictions go the other way (correlation -0."]),
    "unit": (
        {"recorded": one(0, lambda x: x * 1000)},
        ["x: predictions are 0.00", "recorded action x: "],
    ),
    "degrees": (
        {"recorded": one(3, lambda yaw: yaw * 180 / np.pi)},
        ["yaw: predictions are 0.0", "recorded action yaw: "],
    ),
    "smaller": ({"recorded": one(2, lambda z: z / 3)}, ["z: predictions are "]),
    "zero": ({"recorded": one(2, lambda z: z + 0.3)}, ["z: predictions lie -0.", "recorded action z: "]),
    "order": (
        {"recorded": lambda true: true[:, [0, 2, 1, 3, 4, 5]]},
        ["y: predictions follow the recorded z (", "z: predictions follow the recorded y ("],
    ),
    "inverted": ({"recorded": one(GRIP, lambda g: -g)}, ["grip: as recorded in "]),
    "values": ({"recorded": one(GRIP, lambda g: (g + 1) / 2)}, ["grip: recorded from 0 to 1, the policy's"]),
    "late": ({"late": 3}, ["time: if the recorded actions come 3 steps later than"]),
    "early": ({"late": -2}, ["time: if the recorded actions come 2 steps earlier than"]),
    "second": ({"at": lambda t: 2 * t}, ["time: if the recorded actions come 2 times as fast as"]),
    "third": ({"at": lambda t: 3 * t}, ["time: if the recorded actions come 3 times as fast as"]),
    "half": (
        {"at": lambda t: t // 2, "skill": 0.95},
        ["time: if the recorded actions come 2 times as slowly as"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_nothing_else(fault: str) -> None:
    how, expected = FAULTS[fault]
    for seed in range(6):
        found = lay(truth(seed), seed=seed, **{"every": 5, **how}).warnings()
        assert len(found) == len(expected), (seed, found)
        assert all(line.startswith(start) for line, start in zip(found, expected)), (seed, found)


def test_an_order_with_the_gripper_first_is_named() -> None:
    found = lay(truth(0), lambda true: true[:, [GRIP, 0, 1, 2, 3, 4]]).warnings()
    for name, other in (("x", "y"), ("y", "z"), ("z", "yaw"), ("yaw", "still"), ("grip", "x")):
        assert any(line.startswith(f"{name}: predictions follow the recorded {other} (") for line in found)


def test_units_are_guessed() -> None:
    found = lay(truth(0), one(0, lambda x: x * 1000), skill=0.9).warnings()
    assert "is the unit another (millimetres, metres)?" in found[0]


def test_a_policy_that_hardly_moves_is_named() -> None:
    found = lay(truth(0), skill=0.02, every=5)
    found.predicted[:, :4] = found.predicted[:, :4] * 1e-2
    assert found.warnings()[0].startswith("x: predictions do not follow what is recorded, and vary 0.0")


def test_few_looks_say_nothing_of_time_and_slow_numbers_are_few() -> None:
    """Of one slow series every other one seems to follow; 60 steps of it are worth a handful."""
    for seed in range(20):
        loop = lay(truth(seed, absolute=True), skill=0.02, seed=seed, shown=1)
        assert loop.warnings() == loop.hints() == [], seed
        assert loop.judged()["too few looks to tell"][-1] == "time", seed


def test_a_sign_that_looks_flipped_is_a_hint_where_looks_are_few() -> None:
    for seed in range(6):
        loop = lay(truth(seed), one(1, lambda y: -y), skill=0.9, seed=seed, shown=2)
        assert loop.warnings() == [] and "y" in loop.judged()["too few looks to tell"]
        assert [line[:37] for line in loop.hints()] == ["y: looks as if the sign were flipped "], seed
        assert lay(truth(seed), skill=0.02, seed=seed, shown=3).hints() == []
    loop, level = lay(truth(0), skill=0.02, shown=2), np.array([0, 5, 0, 0, 0, 0])
    ends = [
        replace(each, recorded=each.recorded - sign * level, chunks=each.chunks + sign * level)
        for each, sign in zip(loop.episodes, (1, -1))
    ]
    loop = OpenLoop(loop.robot, ends, loop.usual)  # the other way between two episodes, not within them
    assert loop.correlations[1, 1] < -0.9 and loop.hints() == []


def test_what_could_be_judged_is_told_from_what_could_not() -> None:
    enough = {"judged": ["x", "y", "z", "yaw", "grip", "time"], "never changes": ["still"]}
    nothing = {"too few looks to tell": [], "not followed by the policy": []}
    assert lay(truth(0), skill=0.9, every=3).judged() == enough | nothing
    blind = lay(truth(0), skill=0.02, every=3).judged()
    assert blind["not followed by the policy"] == ["x", "y", "z", "yaw"] and blind["judged"] == ["grip"]
    assert lay(truth(0), shown=1).judged()["too few looks to tell"] == ["x", "y", "z", "yaw", "time"]


def test_what_lies_outside_the_training_range() -> None:
    vector = replace(Vector.plain(["u", "v", "w"]), low=[0.0, 0.0, 1.0], high=[1.0, 2.0, 1.0])
    values = np.tile([0.5, 2.1, 1.0], (300, 1))
    values[:100, 0] = np.linspace(0, 1, 100)
    assert list(out_of_range("state", vector, values)) == ["state v: always 2.1, in training 0 … 2"]
    assert list(out_of_range("recorded action", vector, values)) == []
    values[:4, 0], values[:2, 1] = -3, 9  # the second too rare
    assert list(out_of_range("state", vector, values)) == [
        "state u: -3 … 1, in training 0 … 1 (1% lie outside)"
    ]
    assert list(out_of_range("state", Vector.plain(["u", "v", "w"]), values)) == [], "nothing is known"
    many = replace(Vector.plain("abcde"), low=[0.0] * 5, high=[1.0] * 5)
    found = list(out_of_range("state", many, np.full((9, 5), 2.0)))
    assert len(found) == 4 and found[3] == "state: so it is with 2 more, d, e"
