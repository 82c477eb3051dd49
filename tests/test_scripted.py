"""The scripted policies: the judge agrees with them, and they react to the state alone."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("pybullet")

from defi.errors import UserError
from defi.sim.judge import solved
from defi.sim.motion import Block, descend
from defi.sim.play import Attempt, PlayConfig, Player
from defi.sim.scene import SceneConfig
from defi.sim.scenes import builtin, variation
from defi.sim.scripted import BLOCK_SKILLS, FIXTURE_SKILLS, ScriptedPolicy
from defi.sim.sequences import initial_states, start_state
from defi.sim.tasks import TASK_TABLE, TASKS
from defi.sim.world import World

MAX_STEPS, RETREAT = 150, 30


def world_for(task: str, scene: str = "D") -> World:
    """A world in the protocol's first start state in which the task can be asked for."""
    world = World(builtin(scene), cameras=())
    world.reset(*start_state(next(s for s in initial_states() if TASK_TABLE[task].outcome(s) is not None)))
    return world


def run(world: World, task: str, *, noise: float = 0.0, max_steps: int = MAX_STEPS) -> int | None:
    """Let the policy act to its end; the steps until the judge first called the task solved."""
    before, policy, rng = world.state(), ScriptedPolicy(task, world), np.random.default_rng(0)
    solved_after = None
    for step in range(1, max_steps + 1):
        action = policy.act(world)
        if action is None:
            break
        action[:6] = np.clip(action[:6] + noise * rng.normal(size=6), -1, 1)
        world.step(action)
        if solved_after is None and solved(task, before, world.state()):
            solved_after = step
    return solved_after


def play(scene: SceneConfig, task: str, seed: int) -> Attempt:
    """The task in a new world, from a random state or from where the tasks before it left the arm."""
    config = PlayConfig(0, 0, 0, 0, 0, 0.5, MAX_STEPS, 0, MAX_STEPS, 1)  # each task to the policy's end
    with World(scene, cameras=()) as world:
        *_, attempt = Player(world, config, np.random.default_rng(seed)).play([task])
    return attempt


def test_there_is_a_policy_for_every_task():
    assert FIXTURE_SKILLS.keys() | BLOCK_SKILLS.keys() == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_policy_solves_its_task_from_random_states(task):
    for seed in (1, 2):
        attempt = play(builtin("D"), task, seed)
        assert attempt.solved_after is not None
        assert len(attempt.frames) <= attempt.solved_after + RETREAT  # and comes to an end


@pytest.mark.parametrize(
    "scene", [builtin("A"), builtin("B"), builtin("C"), variation("A", 3), variation("B", 4)]
)
def test_policies_know_every_table(scene):
    tasks = [*FIXTURE_SKILLS, "push_red_block_right", "lift_pink_block_table", "rotate_blue_block_left"]
    failed = [task for task in tasks if play(scene, task, seed=0).solved_after is None]
    assert not failed


@pytest.mark.parametrize("task", ["open_drawer", "move_slider_right", "turn_on_led", "lift_red_block_table"])
def test_policy_recovers_from_disturbances(task):
    with world_for(task) as world:
        assert run(world, task, noise=0.5) is not None


@pytest.mark.parametrize("task", ["close_drawer", "move_slider_left", "turn_off_lightbulb", "turn_on_led"])
def test_actions_follow_from_the_state_not_from_a_clock(task):
    with world_for(task) as world:
        before, policy = world.state(), ScriptedPolicy(task, world)
        while not solved(task, before, world.state()):
            action = policy.act(world)
            np.testing.assert_array_equal(action, ScriptedPolicy(task, world).act(world))
            world.step(action)


def test_actions_are_in_range_and_smooth():
    with world_for("open_drawer") as world:
        policy, actions = ScriptedPolicy("open_drawer", world), []
        while (action := policy.act(world)) is not None:
            assert action.shape == (7,)
            assert np.abs(action).max() <= 1
            assert action[6] == -1
            actions.append(action)
            world.step(action)
        assert 25 < len(actions) < 80
        assert np.abs(np.array(actions)[:, 3:6]).max() < 0.1  # the hand keeps pointing down
        assert world.scene_obs()[1] > 0.15


def test_policy_retreats_after_success():
    with world_for("turn_on_led") as world:
        before, policy = world.state(), ScriptedPolicy("turn_on_led", world)
        heights = []
        while (action := policy.act(world)) is not None:
            world.step(action)
            if solved("turn_on_led", before, world.state()):
                heights.append(world.robot_obs()[2])
        assert 5 <= len(heights) <= 15
        assert heights[-1] > heights[0] + 0.06


def test_button_is_pressed_again_if_the_led_has_the_wrong_state():
    with world_for("turn_on_led") as world:
        before, policy = world.state(), ScriptedPolicy("turn_on_led", world)
        while not solved("turn_on_led", before, world.state()):  # no retreat: the finger is on the button
            world.step(policy.act(world))
        assert world.state().lights["led"] == 1
        assert run(world, "turn_off_led")


def test_a_held_block_is_put_down_first():
    with world_for("lift_red_block_table") as world:
        run(world, "lift_red_block_table")
        assert run(world, "turn_on_led", max_steps=250)
        assert world.scene_obs()[8] == pytest.approx(0.46, abs=0.005)


def test_tasks_and_tables_without_a_policy_are_named():
    with world_for("open_drawer") as world:
        with pytest.raises(UserError, match="open_drawer"):
            ScriptedPolicy("open_drawr", world)
        world.scene = replace(world.scene, table=replace(world.scene.table, grips={}))
        with pytest.raises(UserError, match="built-in"):
            ScriptedPolicy("open_drawer", world)


def test_descend_rises_before_it_crosses_and_lowers_only_above_the_goal():
    goal = np.array([0.2, -0.2, 0.45])
    np.testing.assert_array_equal(descend(np.array([0.21, -0.2, 0.6]), goal, 0.55), goal)
    low = descend(np.array([0.0, -0.2, 0.45]), goal, 0.55)
    np.testing.assert_allclose(low[:2], (0.0, -0.2))
    assert low[2] > 0.54
    np.testing.assert_allclose(descend(np.array([0.0, -0.2, 0.6]), goal, 0.55)[:2], goal[:2])
    assert descend(np.array([0.2, 0.1, 0.5]), goal, 0.55)[2] > 0.6  # out of the shelf, over the door


def test_half_extent_of_a_turned_block():
    block = Block(np.zeros(3), np.pi / 2, 0.08)
    assert block.half(0.0) == pytest.approx(0.02)
    assert block.half(np.pi / 2) == pytest.approx(0.04)
    assert block.half(np.pi / 4) == pytest.approx(0.06 / np.sqrt(2))
