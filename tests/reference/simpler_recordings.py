"""Reads the recorded SIMPLER episodes: numpy only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from defi.benchmarks.simpler.episodes import TASKS, Episode, episodes
from defi.benchmarks.simpler.judge import Contact
from defi.benchmarks.simpler.poses import composed, turn_of


class Recording:
    """One `trajectories/*.npz`. Its arrays by attribute; `meta`, `info` and `contacts` are read from JSON."""

    def __init__(self, file: Path) -> None:
        self.name, self.file = file.stem, file
        with np.load(file) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.meta = json.loads(str(self.arrays["meta"]))
        self.info = [json.loads(each) for each in self.arrays["info"]]
        self.actor_names = [str(name) for name in self.arrays["actor_names"]]
        self.joint_names = [str(name) for name in self.arrays["joint_names"]]
        self.task = TASKS[self.meta["task"]]

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["arrays"][name]
        except KeyError:
            raise AttributeError(name) from None

    def contacts_of(self, row: int) -> list[Contact]:
        return [
            Contact(*each[:2], np.array(each[2:])) for each in json.loads(str(self.arrays["contacts"][row]))
        ]

    @property
    def scripted(self) -> bool:
        return self.meta["notes"].startswith("scripted")

    @property
    def episode(self) -> Episode:
        """The episode of the table that starts as this one did, with this one's own places."""
        options = self.meta["reset_options"]
        robot, objects = options["robot_init_options"], options["obj_init_options"]
        found = episodes(self.task.name)
        if "episode_id" in objects:
            found = found[objects["episode_id"] :]
        if "orientation" in objects:
            found = [each for each in found if each.setting.split()[0] == objects["orientation"]]
            found = [replace(found[0], objects=(replace(found[0].objects[0], xy=tuple(objects["init_xy"])),))]
        w, _, _, z = robot["init_rot_quat"]
        return replace(
            found[0],
            base=(*robot["init_xy"], 2 * float(np.arctan2(-w, z))),
            colours=self.meta["urdf_version"],
            photo=self.meta["overlay"].removesuffix(".png"),
        )


def recordings(reference: Path) -> list[Recording]:
    files = sorted((reference / "simpler/trajectories").glob("*.npz"))
    if not files:
        pytest.skip(f"no recorded episodes in {reference / 'simpler/trajectories'}")
    return [Recording(file) for file in files]


def simpler_root(reference: Path) -> Path:
    root = reference / "simpler_root"
    if not (root / "ManiSkill2_real2sim").is_dir():
        pytest.skip(f"no assets at {root}")
    return root


def _numbers(element: Any, key: str) -> list[float]:
    return [float(each) for each in (element.get(key, "0 0 0") if element is not None else "0 0 0").split()]


def link_poses(urdf: Path, base: np.ndarray, joints: dict[str, float]) -> dict[str, np.ndarray]:
    """Poses of all links in the world, from the robot's description and joints: what these two need."""
    poses: dict[str, np.ndarray] = {}
    todo = ElementTree.parse(urdf).getroot().findall("joint")
    children = {joint.find("child").get("link") for joint in todo}  # type: ignore[union-attr]
    while todo:
        joint = todo.pop(0)
        parent, child = (joint.find(each).get("link") for each in ("parent", "child"))  # type: ignore[union-attr]
        if parent not in children:
            poses[parent] = np.asarray(base, float)
        if parent not in poses:
            todo.append(joint)
            continue
        origin, axis = joint.find("origin"), np.array(_numbers(joint.find("axis"), "xyz"))
        roll, pitch, yaw = _numbers(origin, "rpy")
        pose = composed(poses[parent], (*_numbers(origin, "xyz"), *turn_of((0, 0, yaw))))
        pose = composed(composed(pose, (0, 0, 0, *turn_of((0, pitch, 0)))), (0, 0, 0, *turn_of((roll, 0, 0))))
        value = joints.get(joint.get("name", ""), 0.0)
        if joint.get("type") == "prismatic":
            pose = composed(pose, (*(axis * value), 1, 0, 0, 0))
        elif joint.get("type") in ("revolute", "continuous"):
            pose = composed(pose, (0, 0, 0, *turn_of(axis * value)))
        poses[child] = pose
    return poses
