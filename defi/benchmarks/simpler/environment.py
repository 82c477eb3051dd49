"""SIMPLER's world for a policy: reset to an episode, look when a picture is needed, act."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from defi.benchmarks.simpler.control import control_of
from defi.benchmarks.simpler.episodes import Episode, Placed
from defi.benchmarks.simpler.judge import Info, Judge, Settled, State, judge_of, world_box
from defi.benchmarks.simpler.picture import Eye
from defi.benchmarks.simpler.poses import Pose
from defi.benchmarks.simpler.scene import (
    DROP,
    FALL_ONLY,
    FREE,
    LOCKED,
    TABLE,
    UPRIGHT_ONLY,
    Scene,
    pose_of,
    sapien_pose,
)

AWAY = (-10.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)  # where the robot waits while objects are dropped
SINK = (-0.16, 0.13, 0.88, 1.0, 0.0, 0.0, 0.0)


@dataclass
class Moment:
    """Where everything is: joints, one list for the arm, one for a cabinet, and the objects' poses."""

    joints: list[np.ndarray]
    poses: list[Any]


@dataclass
class Observation:
    """What a policy may know of a moment.

    images: by camera, uint8 [H, W, 3]; none where they were not asked for. joints, speeds: [J], rad or m, and
    per second, in the official order. base: the robot's in the world; tip: the gripper's in the base's frame.
    """

    images: dict[str, np.ndarray]
    joints: np.ndarray
    speeds: np.ndarray
    base: Pose
    tip: Pose
    instruction: str


class Simpler:
    """One world at a time. The same episode and actions end the same, to the last bit, whatever ran before.

    root: the user's clone of SimplerEnv. drawn: pictures can be asked for, which needs a Vulkan driver.
    traced: the drawers' are ray-traced, as officially; others never are.
    After `reset`, `info` says what the judge said of the last step, and `steps` how many there were.
    """

    def __init__(self, root: Path, *, drawn: bool = True, traced: bool = False) -> None:
        self.root, self.drawn, self.traced = root, drawn, traced

    def reset(self, episode: Episode) -> None:
        """Drop the objects, let them settle, put the robot to its start.

        Raises:
            UserError: SAPIEN or an asset is missing.
        """
        # A world of its own for each episode: in a used one contacts come out otherwise in the last digits,
        # and an episode would depend on those before it. Meshes and textures stay loaded.
        self.scene = Scene(self.root, episode, drawn=self.drawn)
        self.control = control_of(self.scene)
        traced = self.traced and self.scene.cabinet is not None
        self.eye = Eye(self.scene, episode, traced=traced) if self.drawn else None
        self.episode, self.steps, self.info = episode, 0, {}
        scene = self.scene
        scene.arm.set_root_pose(sapien_pose(AWAY))
        settled = self._settle(episode.objects) if episode.objects else None
        scene.stand(episode.base)
        self.control.reset()
        if scene.cabinet is not None:
            scene.open_drawer(0.2 if episode.task.kind == "close" else 0.0)
        self.judge: Judge = judge_of(episode.task, settled)

    def _settle(self, objects: tuple[Placed, ...]) -> Settled:
        scene = self.scene
        if scene.sink is not None:
            scene.place(scene.sink, SINK, LOCKED)
        beside = objects[1:] if self.episode.task.kind == "pick" else ()
        bodies = [scene.objects[placed.model] for placed in objects if placed not in beside]
        for number, placed in enumerate(beside, start=1):
            scene.place(scene.objects[placed.model], (10, number, 0, *placed.turn), LOCKED)
        for body, placed in zip(bodies, objects):
            scene.place(body, (*placed.xy, TABLE + DROP, *placed.turn), UPRIGHT_ONLY)
        scene.rest(0.5)
        for body in bodies:
            scene.place(body, pose_of(body.entity.pose), FREE)
        scene.rest(0.5)
        self._calm(bodies)
        poses = {body.entity.name: pose_of(body.entity.pose) for body in bodies}
        boxes = {name: scene.model(name)["bbox"] for name in poses}
        settled = Settled(
            objects[self.episode.source].model,
            objects[self.episode.target].model,
            {name: pose[:3] for name, pose in poses.items()},
            {body.entity.name: np.asarray(body.cmass_local_pose.p, float) for body in bodies},
            {
                name: world_box(poses[name], np.subtract(box["max"], box["min"]))
                for name, box in boxes.items()
            },
            set(scene.links),
        )
        self._settle_beside(beside)
        return settled

    def _settle_beside(self, objects: tuple[Placed, ...]) -> None:
        """Distractors, one after another: two may come down at the same place."""
        scene, bodies = self.scene, [self.scene.objects[placed.model] for placed in objects]
        for body, placed in zip(bodies, objects):
            scene.place(body, (*placed.xy, TABLE + DROP, *placed.turn), FALL_ONLY)
            scene.rest(0.5)
        for body in bodies:
            scene.place(body, pose_of(body.entity.pose), FREE)
            scene.rest(0.5)
        self._calm(bodies)

    def _calm(self, bodies: list[Any]) -> None:
        """More time, where something moves still."""
        moving = sum(np.linalg.norm(body.linear_velocity) for body in bodies)
        turning = sum(np.linalg.norm(body.angular_velocity) for body in bodies)
        if moving > 1e-3 or turning > 1e-2:
            self.scene.rest(1.5)

    def step(self, action: np.ndarray) -> Info:
        """Act for one step of control: [7], see `control.py`. What the judge says; `success` is in it."""
        self.control.act(np.asarray(action, float))
        for index in range(1, self.scene.robot.substeps + 1):
            self.control.substep(index)
            self.scene.substep()
        self.steps += 1
        self.info = self.judge(self.state())
        return self.info

    def observe(self, pictures: bool = True) -> Observation:
        """What is seen and felt now. A picture is drawn when asked for; that takes longer than a step."""
        scene, images = self.scene, {}
        if pictures:
            assert self.eye is not None, "made with drawn=False"
            images[self.eye.name] = self.eye.picture()
        base = pose_of(scene.arm.root_pose)
        return Observation(
            images, scene.joint_places(), scene.joint_speeds(), base, self.tip, self.episode.instruction
        )

    def moment(self) -> Moment:
        """Where everything is now, to be drawn later."""
        moving, objects = self._moving(), self.scene.objects.values()
        return Moment([np.array(each.qpos) for each in moving], [body.entity.pose for body in objects])

    def picture(self, moment: Moment) -> np.ndarray:
        """What was seen at a moment of this episode: uint8 [H, W, 3]. Where the camera moves, a few pixels at
        edges may differ: poses come back to the last digit or so. The episode cannot go on after that."""
        assert self.eye is not None, "made with drawn=False"
        for each, joints in zip(self._moving(), moment.joints):
            each.set_qpos(joints)
        for body, pose in zip(self.scene.objects.values(), moment.poses):
            body.entity.set_pose(pose)
        return self.eye.picture()

    def _moving(self) -> list[Any]:
        return [each for each in (self.scene.arm, self.scene.cabinet) if each is not None]

    def state(self) -> State:
        """What the judge looks at."""
        scene = self.scene
        if scene.cabinet is not None:
            return State(drawer=scene.drawer())
        objects = {name: pose_of(body.entity.pose) for name, body in scene.objects.items()}
        fingers = {name: pose_of(link.entity.pose) for name, link in scene.links.items() if "finger" in name}
        return State(objects, scene.contacts(), fingers)

    @property
    def tip(self) -> Pose:
        """The gripper's tip in the frame of the robot's base."""
        return self.control.kinematics.pose()
