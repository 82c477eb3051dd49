"""The simulator, judge and protocol against recorded truth (CALVIN's official simulator and evaluation)."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from replay import replay

from defi.sim import judge, sequences
from defi.sim.tasks import TASK_TABLE, TASKS

pytest.importorskip("pybullet")
from defi.sim.scene import SceneConfig
from defi.sim.world import World


def recordings(reference: Path) -> Iterator[tuple[World, dict[str, np.ndarray]]]:
    """For each recorded scene a new world, and what was recorded in one like it."""
    paths = sorted((reference / "calvin").glob("rollouts_scene_*.npz"))
    assert paths
    for path in paths:
        scene = path.stem.removeprefix("rollouts_scene_")
        with np.load(path) as file, World(SceneConfig.from_calvin(reference / "calvin_root", scene)) as world:
            yield world, dict(file)


def test_trajectories_frames_and_judgements(reference: Path) -> None:
    for world, data in recordings(reference):
        replay(world, data)


def test_reload_forgets_the_past(reference: Path) -> None:
    recorded = recordings(reference)  # the world is closed with it
    world, data = next(recorded)
    replay(world, data)
    world.reload()
    replay(world, data)


def test_judged_cases(reference: Path) -> None:
    file = json.loads((reference / "calvin" / "task_oracle_cases.json").read_text())
    assert file["task_names"] == list(TASKS)

    def contacts(pairs: list[list[int]]) -> frozenset[judge.Contact]:
        return frozenset((body, link) for body, link in pairs)

    def state(case: dict) -> judge.JudgeState:
        blocks = {
            name: judge.BlockState(
                body=block["uid"],
                position=tuple(block["pos"]),
                quaternion=tuple(block["orn"]),
                linear_velocity=tuple(block["lin_vel"]),
                angular_velocity=tuple(block["ang_vel"]),
                contacts=contacts(block["contacts"]),
            )
            for name, block in case["movable"].items()
        }
        return judge.JudgeState(
            robot=file["robot_uid"],
            table=file["table_uid"],
            links=file["table_links"],
            blocks=blocks,
            doors=case["doors"],
            lights=case["lights"],
            robot_contacts=contacts(case["robot_contacts"]),
        )

    for case in file["cases"]:
        assert judge.solved_tasks(state(case["start"]), state(case["end"])) == set(case["tasks"])


def test_thresholds_are_the_clone_s(reference: Path) -> None:
    path = reference / "calvin_root" / "calvin_env" / "conf" / "tasks" / "new_playtable_tasks.yaml"
    rules = OmegaConf.to_container(OmegaConf.load(path))["tasks"]
    assert list(rules) == list(TASKS)
    for color in ("red", "blue", "pink"):
        for sign, side in ((1, "right"), (-1, "left")):
            assert rules[f"rotate_{color}_block_{side}"][2] == -sign * judge.ROTATION
            assert rules[f"push_{color}_block_{side}"][2] == sign * judge.PUSH
        for place, link in judge.SURFACE_LINK.items():
            assert rules[f"lift_{color}_block_{place}"][2:] == [judge.LIFT[place], "table", link]
    assert rules["move_slider_left"][2] == -rules["move_slider_right"][2] == judge.SLIDE
    assert rules["open_drawer"][2] == -rules["close_drawer"][2] == judge.DRAWER


def test_task_conditions(reference: Path) -> None:
    file = json.loads((reference / "calvin" / "task_conditions.json").read_text())
    assert list(file["alternatives"]) == list(TASKS)
    for name, alternatives in file["alternatives"].items():
        task = TASK_TABLE[name]
        assert task.category == file["category"][name]
        assert len(task.alternatives) == len(alternatives)
        for (ours_needs, ours_gives), theirs in zip(task.alternatives, alternatives):
            needs = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in theirs["condition"].items()}
            assert ours_needs == needs
            # An effect that repeats its condition changes nothing.
            changes = {k: v for k, v in theirs["effect"].items() if needs.get(k) != (v,)}
            assert ours_gives == changes


def test_sequences_and_start_states(reference: Path) -> None:
    files = sorted((reference / "calvin").glob("sequences_*.json"))
    assert files
    for path in files:
        recorded = json.loads(path.read_text())
        chains = sequences.sequences(len(recorded))
        ours = [{"initial_state": chain.initial_state, "tasks": list(chain.tasks)} for chain in chains]
        assert ours == recorded
    for path in sorted((reference / "calvin").glob("initial_obs_*.npz")):
        with np.load(path) as file:
            count = len(file["robot_obs"])
            recorded = json.loads(path.with_name(f"sequences_{count}.json").read_text())
            for i, sequence in enumerate(recorded):
                robot_obs, scene_obs = sequences.start_state(sequence["initial_state"])
                assert np.array_equal(robot_obs, file["robot_obs"][i])
                assert np.array_equal(scene_obs, file["scene_obs"][i])
