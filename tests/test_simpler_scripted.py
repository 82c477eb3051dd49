"""SIMPLER's random starts, and scripted policies of the WidowX, by the official judge."""

from itertools import combinations
from math import dist
from pathlib import Path

import numpy as np
import pytest

from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.episodes import DRAWER_BASES, TASKS, episodes
from defi.benchmarks.simpler.poses import matrix, multiplied
from defi.benchmarks.simpler.scripted import STEP, TURN, scripted
from defi.benchmarks.simpler.starts import BEYOND, TURNED, random_start

WIDOWX = [name for name, task in TASKS.items() if task.robot.startswith("widowx")]
NOISE = np.array([0.004] * 3 + [0.005] * 3 + [0.0])  # m, rad, of an action
SLOW_NOISE = 0.9  # of it stays from step to step


@pytest.mark.parametrize("task", TASKS)
def test_random_starts_are_near_the_official_ones(task: str) -> None:
    official, random = episodes(task), np.random.default_rng(0)
    starts = [random_start(task, random, index) for index in range(40)]
    assert [start.index for start in starts] == list(range(40)) and len(set(starts)) == 40
    for start in starts:
        assert (start.task, start.setting) == (official[0].task, "")
        assert start.instruction in {each.instruction for each in official}
        for place, placed in enumerate(start.objects):
            spots = np.array([each.objects[place].xy for each in official])
            assert (spots.min(0) - BEYOND <= placed.xy).all() and (placed.xy <= spots.max(0) + BEYOND).all()
            turns = {
                each.objects[place].turn for each in official if each.objects[place].model == placed.model
            }
            apart = [matrix(multiplied(placed.turn, np.multiply(turn, (1, -1, -1, -1)))) for turn in turns]
            assert max(np.trace(each) for each in apart) >= 1 + 2 * np.cos(TURNED) - 1e-9
        if task == "widowx_put_eggplant_in_basket":
            assert start.objects[1] == official[0].objects[1], "it is invisible, and judged by"
        for one, other in combinations(start.objects, 2):
            assert dist(one.xy, other.xy) >= 0.08
        if not start.objects:
            nearest = min(DRAWER_BASES, key=lambda tag: dist(DRAWER_BASES[tag][:2], start.base[:2]))
            assert start.photo == f"open_drawer_{nearest}" and start.base != DRAWER_BASES[nearest]
    if starts[0].objects:
        low, high = (bound([each.objects[0].xy for each in starts], 0) for bound in (np.min, np.max))
        spots = np.array([each.objects[0].xy for each in official])
        assert (low < spots.min(0)).any() and (high - low > 0.8 * np.ptp(spots, 0)).all()  # all of it is used


@pytest.fixture(scope="module")
def root(reference: Path) -> Path:
    pytest.importorskip("sapien", reason="SAPIEN 3 is not installed: pip install .[simpler]")
    folder = reference / "simpler_root"
    if not folder.is_dir():
        pytest.skip(f"no SIMPLER assets at {folder}")
    return folder


@pytest.mark.parametrize("task", WIDOWX)
def test_simpler_is_solved_disturbed_and_what_is_put_down_stays(task: str, root: Path) -> None:
    random = np.random.default_rng(3)
    simpler = Simpler(root, drawn=False)
    simpler.reset(random_start(task, random))
    policy, noise, solved_for = scripted(simpler, random), np.zeros(7), 0
    while not policy.done:
        assert simpler.steps < simpler.episode.task.steps - 5
        action = policy.action()
        assert np.linalg.norm(action[:3]) < STEP + 0.01 and np.linalg.norm(action[3:6]) <= TURN + 1e-9
        assert policy.action() == pytest.approx(action)  # from the state alone
        noise = SLOW_NOISE * noise + np.sqrt(1 - SLOW_NOISE**2) * NOISE * random.normal(size=7)
        simpler.step(action + noise)
    for _ in range(5):
        solved_for += simpler.step(policy.action())["success"]
    assert solved_for == 5 and not simpler.info["is_src_obj_grasped"]


def test_a_source_that_is_moved_away_is_grasped_all_the_same(root: Path) -> None:
    simpler = Simpler(root, drawn=False)
    simpler.reset(episodes("widowx_stack_cube")[0])
    policy = scripted(simpler, np.random.default_rng(0))
    for _ in range(8):
        simpler.step(policy.action())
    cube = simpler.scene.objects["baked_green_cube_3cm"]
    pose = np.concatenate([cube.entity.pose.p, cube.entity.pose.q]) + (0.03, 0, 0, 0, 0, 0, 0)
    simpler.scene.place(cube, pose, [False] * 6)
    while not policy.done:
        assert simpler.steps < simpler.episode.task.steps
        simpler.step(policy.action())
    assert simpler.info["success"]
