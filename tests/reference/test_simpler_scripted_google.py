"""Scripted policies of the Google robot, by the official judge: disturbed, from the farthest places."""

from pathlib import Path

import numpy as np
import pytest
from simpler_recordings import simpler_root

pytest.importorskip("sapien", reason="SAPIEN 3 is not installed: pip install .[simpler]")

from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.episodes import DRAWER_BASES, Episode, episodes
from defi.benchmarks.simpler.scene import pose_of
from defi.benchmarks.simpler.scripted_google import google

NOISE = np.array([0.01] * 3 + [0.03] * 3 + [0.0])  # m, rad; of each action
CAN, PUSHED = "opened_coke_can", 0.05


def solve(root: Path, episode: Episode, push_at: int | None = None) -> Simpler:
    """The world when the policy is done. push_at: the step before which somebody moves the can."""
    simpler, random = Simpler(root, drawn=False), np.random.default_rng(0)
    simpler.reset(episode)
    policy = google(simpler, np.random.default_rng(1))
    while not policy.done:
        assert simpler.steps < episode.task.steps
        if simpler.steps == push_at:
            body = simpler.scene.objects[CAN]
            pose = pose_of(body.entity.pose) + (0.0, PUSHED, 0, 0, 0, 0, 0)
            simpler.scene.place(body, pose, [False] * 6)
        action = policy.action()
        assert np.linalg.norm(action[:3]) < 0.1 and np.linalg.norm(action[3:6]) < 0.3 and abs(action[6]) <= 1
        simpler.step(action + NOISE * random.normal(size=7))
    return simpler


def test_a_can_that_is_pushed_away_is_picked(reference: Path) -> None:
    start = episodes("google_robot_pick_coke_can")[50]
    assert start.setting == "laid_vertically" and start.objects[0].xy == (-0.35, -0.02)  # the farthest
    simpler = solve(simpler_root(reference), start, push_at=20)
    assert simpler.info["success"] and simpler.info["is_grasped"]
    place = simpler.state().objects[CAN]
    assert place[1] > start.objects[0].xy[1] + PUSHED / 2 and place[2] > 0.95


def test_a_drawer_is_opened_from_closed(reference: Path) -> None:
    start = episodes("google_robot_open_bottom_drawer")[2]
    assert start.base == DRAWER_BASES["a2"]  # the farthest
    simpler = solve(simpler_root(reference), start)
    assert simpler.info["success"] and simpler.info["qpos"] < 0.3  # pulled, not flung


def test_a_drawer_is_closed(reference: Path) -> None:
    simpler = solve(simpler_root(reference), episodes("google_robot_close_bottom_drawer")[2])
    assert simpler.info["success"] and simpler.info["qpos"] > 0.0
