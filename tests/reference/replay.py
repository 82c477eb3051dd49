"""Recorded episodes of CALVIN's official simulator, run again in a world of ours."""

from typing import Any

import numpy as np

from defi.sim import judge

PLATFORM = 1e-9  # what another processor's arithmetic may change; here the difference is 0


def replay(world: Any, data: dict[str, np.ndarray]) -> None:
    """All recorded episodes of a scene, one after the other in one world: states, pictures, solved tasks."""
    names = data["task_names"].tolist()
    for episode, actions in enumerate(data["actions"]):
        world.reset(data["init_robot_obs"][episode], data["init_scene_obs"][episode])
        start = world.state()
        assert_obs(world, data["reset_robot_obs"][episode], data["reset_scene_obs"][episode])
        assert_frames(world, data, episode, 0)
        for i, action in enumerate(actions):
            world.step(action)
            assert_obs(world, data["robot_obs"][episode, i], data["scene_obs"][episode, i])
            solved = {name for name, yes in zip(names, data["tasks"][episode, i]) if yes}
            assert judge.solved_tasks(start, world.state()) == solved
        assert_frames(world, data, episode, -1)


def assert_obs(world: Any, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
    assert np.abs(world.robot_obs() - robot_obs).max() <= PLATFORM
    assert np.abs(world.scene_obs() - scene_obs).max() <= PLATFORM


def assert_frames(world: Any, data: dict[str, np.ndarray], episode: int, frame: int) -> None:
    pictures = world.render()
    for camera in ("static", "gripper"):
        assert np.array_equal(pictures[f"rgb_{camera}"], data[f"frames_{camera}"][episode, frame])
