"""Tasks, their words, the protocol's chains and start states."""

import numpy as np
import pytest

from defi.errors import UserError
from defi.sim import sequences
from defi.sim.sequences import CHAIN_LENGTH, Chain
from defi.sim.tasks import INSTRUCTIONS, TASK_TABLE, TASKS, check_task, check_tasks

TOGGLES = [
    "open_drawer", "close_drawer", "move_slider_left", "move_slider_right",
    "turn_on_led", "turn_off_led", "turn_on_lightbulb", "turn_off_lightbulb",
]  # fmt: skip


def assert_feasible(chain: Chain) -> None:
    situation = chain.initial_state
    for task in chain.tasks:
        situation = TASK_TABLE[task].outcome(situation)
        assert situation is not None


def test_task_names() -> None:
    assert len(TASKS) == 34
    assert check_task("open_drawer") == "open_drawer"
    with pytest.raises(UserError, match="did you mean .*push_red_block_left"):
        check_task("push_red_left")
    with pytest.raises(UserError, match="one of rotate_red_block_right"):
        check_task("zzz")
    with pytest.raises(UserError, match="twice"):
        check_tasks(["open_drawer", "open_drawer"])


def test_instructions_tell_tasks_apart() -> None:
    phrases = [phrase for task in TASKS for phrase in INSTRUCTIONS[task]]
    assert all(len(INSTRUCTIONS[task]) >= 6 for task in TASKS)
    assert len(set(phrases)) == len(phrases)
    for task in TASKS:
        words = task.split("_")
        for phrase in INSTRUCTIONS[task]:
            assert "{" not in phrase
            assert all(color in phrase for color in ("red", "blue", "pink") if color in words)
            if words[-1] in ("left", "right"):
                assert words[-1] in phrase or "clockwise" in phrase


def test_an_alternative_must_be_the_only_one() -> None:
    situation = sequences.initial_states()[0] | {"red_block": "grasped", "grasped": 1}
    both = situation | {"blue_block": "table", "pink_block": "table"}
    assert TASK_TABLE["stack_block"].outcome(both) is None
    one = situation | {"blue_block": "table", "pink_block": "slider_left"}
    assert TASK_TABLE["stack_block"].outcome(one)["blue_block"] == "stacked_bottom"


def test_draws_are_those_of_numpy_choice() -> None:
    numpy_rng, ours = np.random.RandomState(3), np.random.RandomState(3)
    drawn = sequences._draw_chains(ours)
    expected = [numpy_rng.choice(len(TASKS), CHAIN_LENGTH, replace=False) for _ in range(len(drawn))]
    assert np.array_equal(drawn, expected)


def test_sequences_follow_the_rules() -> None:
    chains = sequences.sequences(12)
    assert len(chains) == 12
    assert chains == sequences.sequences(12)
    for chain in chains:
        assert_feasible(chain)
        assert len({TASK_TABLE[task].category for task in chain.tasks}) == len(chain.tasks) == CHAIN_LENGTH
    with pytest.raises(UserError, match="ask for 1 to 100000"):
        sequences.sequences(0)


def test_initial_states() -> None:
    states = sequences.initial_states()
    assert len({tuple(state.values()) for state in states}) == len(states) == 192
    for state in states:
        places = [state[f"{color}_block"] for color in ("red", "blue", "pink")]
        assert places.count("table") in (1, 2)
        assert places.count("slider_left") < 2 and places.count("slider_right") < 2


def test_chains_of_a_subset() -> None:
    chains = sequences.chains(TOGGLES, 40, seed=1)
    assert chains == sequences.chains(TOGGLES, 40, seed=1) != sequences.chains(TOGGLES, 40, seed=2)
    assert {task for chain in chains for task in chain.tasks} == set(TOGGLES)
    assert len({tuple(chain.initial_state.values()) for chain in chains}) > 20
    for chain in chains:
        assert_feasible(chain)
        assert len(set(chain.tasks)) == 5
    assert all(not {"open_drawer", "close_drawer"} <= set(chain.tasks) for chain in chains)


def test_chains_that_cannot_be() -> None:
    with pytest.raises(UserError, match="no chain of 2 .*; name more, or set length=1$"):
        sequences.chains(["open_drawer", "close_drawer"], 1, length=2)
    with pytest.raises(UserError, match="no chain of 5 .*, or set length=2$"):
        sequences.chains(["open_drawer", "turn_on_led"], 1)
    with pytest.raises(UserError, match="no chain of 1 .*; name more$"):  # nothing is held at the start
        sequences.chains(["place_in_slider"], 1, length=1)
    with pytest.raises(UserError, match="no such task"):
        sequences.chains(["open_door"], 1, length=1)


def test_fnv1() -> None:
    assert sequences.fnv1(b"") == 0
    assert sequences.fnv1(b"a") == 0x61
    assert sequences.fnv1(b"ab") == 0x61 * 0x01000193 % 2**32 ^ 0x62


def test_start_states() -> None:
    for situation in sequences.initial_states()[::17]:
        robot_obs, scene_obs = sequences.start_state(situation)
        again = sequences.start_state(dict(situation))
        assert np.array_equal(robot_obs, again[0]) and np.array_equal(scene_obs, again[1])
        assert robot_obs.shape == (15,) and scene_obs.shape == (24,)
        assert (scene_obs[0] > 0) == (situation["slider"] == "left")
        assert (scene_obs[1] > 0) == (situation["drawer"] == "open")
        assert (scene_obs[3] > 0) == scene_obs[4] == situation["lightbulb"]
        assert scene_obs[5] == situation["led"]
        poses = scene_obs[6:].reshape(3, 6)
        assert len({tuple(pose[:3]) for pose in poses}) == 3, "no two blocks in one place"
        for name, pose in zip(("red_block", "blue_block", "pink_block"), poses):
            assert (pose[1] > 0) == (situation[name] != "table")
            assert abs(pose[5] - np.pi / 2) <= np.pi / 8
