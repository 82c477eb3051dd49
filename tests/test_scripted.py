"""The scripted experts: the judge agrees with them, and they react to the state alone."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("pybullet")

from defi.errors import UserError
from defi.sim.experts import EXPERT_TASKS, Expert
from defi.sim.experts.fixtures import FIXTURE_SKILLS
from defi.sim.experts.motion import Block, descend
from defi.sim.experts.rates import Trial, measure, random_start, run_expert
from defi.sim.judge import solved
from defi.sim.scene import SceneConfig
from defi.sim.scenes import builtin, variation
from defi.sim.sequences import initial_states, start_state
from defi.sim.tasks import TASK_TABLE, TASKS
from defi.sim.world import World

MAX_STEPS = 150


def world_for(task: str, scene: str = "D") -> World:
    """A world in the protocol's first start state in which the task can be asked for."""
    world = World(builtin(scene), cameras=())
    world.reset(*start_state(next(s for s in initial_states() if TASK_TABLE[task].outcome(s) is not None)))
    return world


def trials(
    scene: SceneConfig, tasks: list[str], *, n: int, seed: int, noise: float = 0.0, workers: int = 1
) -> list[Trial]:
    measured = measure(scene, tasks, n=n, seed=seed, noise=noise, max_steps=MAX_STEPS, workers=workers)
    return [trial for _, tries in measured for trial in tries]


def test_there_is_an_expert_for_every_task():
    assert EXPERT_TASKS == TASKS


@pytest.mark.parametrize("task", EXPERT_TASKS)
def test_expert_solves_its_task_from_random_states(task):
    for trial in trials(builtin("D"), [task], n=2, seed=1):
        assert trial.solved_after is not None
        assert trial.steps <= trial.solved_after + 30  # and comes to an end


@pytest.mark.parametrize(
    "scene", [builtin("A"), builtin("B"), builtin("C"), variation("A", 3), variation("B", 4)]
)
def test_experts_know_every_table(scene):
    tasks = [*FIXTURE_SKILLS, "push_red_block_right", "lift_pink_block_table", "rotate_blue_block_left"]
    assert all(trial.solved_after is not None for trial in trials(scene, tasks, n=1, seed=3))


@pytest.mark.parametrize("task", ["open_drawer", "move_slider_right", "turn_on_led", "lift_red_block_table"])
def test_expert_makes_good_a_disturbance(task):
    disturbed = trials(builtin("D"), [task], n=2, seed=2, noise=0.5)
    assert all(trial.solved_after is not None for trial in disturbed)


@pytest.mark.parametrize("task", ["close_drawer", "move_slider_left", "turn_off_lightbulb", "turn_on_led"])
def test_actions_follow_from_the_state_not_from_a_clock(task):
    with world_for(task) as world:
        before, expert = world.state(), Expert(task, world)
        while not solved(task, before, world.state()):
            action = expert.act(world)
            np.testing.assert_array_equal(action, Expert(task, world).act(world))
            world.step(action)


def test_actions_are_in_range_and_smooth():
    with world_for("open_drawer") as world:
        expert, actions = Expert("open_drawer", world), []
        while (action := expert.act(world)) is not None:
            assert action.shape == (7,)
            assert np.abs(action).max() <= 1
            assert action[6] == -1
            actions.append(action)
            world.step(action)
        assert 25 < len(actions) < 80
        assert np.abs(np.array(actions)[:, 3:6]).max() < 0.1  # the hand keeps pointing down
        assert world.scene_obs()[1] > 0.15


def test_expert_retreats_after_success():
    with world_for("turn_on_led") as world:
        before, expert = world.state(), Expert("turn_on_led", world)
        heights = []
        while (action := expert.act(world)) is not None:
            world.step(action)
            if solved("turn_on_led", before, world.state()):
                heights.append(world.robot_obs()[2])
        assert 5 <= len(heights) <= 15
        assert heights[-1] > heights[0] + 0.06


def test_led_that_was_pressed_by_mistake_is_pressed_again():
    with world_for("turn_on_led") as world:
        task = "turn_on_led"
        run_expert(world, task, max_steps=MAX_STEPS, at_once=True, noise=0, rng=np.random.default_rng(0))
        assert world.state().lights["led"] == 1
        rng = np.random.default_rng(0)
        assert run_expert(
            world, "turn_off_led", max_steps=MAX_STEPS, at_once=False, noise=0, rng=rng
        ).solved_after


def test_a_held_block_is_put_down_first():
    with world_for("lift_red_block_table") as world:
        rng = np.random.default_rng(0)
        run_expert(world, "lift_red_block_table", max_steps=MAX_STEPS, at_once=False, noise=0, rng=rng)
        assert run_expert(world, "turn_on_led", max_steps=250, at_once=False, noise=0, rng=rng).solved_after
        assert world.scene_obs()[8] == pytest.approx(0.46, abs=0.005)


def test_rates_do_not_depend_on_the_number_of_processes():
    settings = {"n": 2, "seed": 5, "noise": 0.3}
    tasks = ["turn_on_led", "open_drawer"]
    alone = trials(builtin("D"), tasks, workers=1, **settings)
    assert alone == trials(builtin("D"), tasks, workers=2, **settings)


def test_random_starts_allow_the_task():
    with World(builtin("D"), cameras=()) as world:
        for i in range(4):
            world.reload()
            random_start(world, "move_slider_left", np.random.default_rng(i), max_steps=MAX_STEPS)
            assert world.scene_obs()[0] < 0.14


def test_what_experts_cannot_do_is_told():
    with world_for("open_drawer") as world:
        with pytest.raises(UserError, match="open_drawer"):
            Expert("open_drawr", world)
        world.scene = replace(world.scene, table=replace(world.scene.table, grips={}))
        with pytest.raises(UserError, match="built-in"):
            Expert("open_drawer", world)


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
