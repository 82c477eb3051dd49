"""From an action to targets of the joints' drives: the official controllers.

An action is [7]: a move of the tip (m), a turn (rotation vector, rad), both along the base's axes, and
the gripper. WidowX: gripper 1 is open, −1 closed; Google robot: positive closes, a change of the target.
"""

from typing import Any, Protocol

import numpy as np

from defi.benchmarks.simpler.grip import LAG, TIPS_MEET
from defi.benchmarks.simpler.poses import Pose, matrix, multiplied, turn_of
from defi.benchmarks.simpler.scene import Scene, pose_of, sapien_pose

IK_TOLERANCE, IK_ITERATIONS, IK_STEP, IK_DAMPING = 1e-4, 100, 0.1, 1e-6


class Control(Protocol):
    """Of one robot; reset when it stands at its start. A joint's values are in the official order."""

    kinematics: "Kinematics"

    def reset(self) -> None: ...

    def act(self, action: np.ndarray) -> None:
        """A step's targets from what is measured now."""

    def substep(self, index: int) -> None:
        """Before each sub-step, from 1 on."""


class Kinematics:
    """The tip's pose in the base's frame [7], and joints that bring it to one."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.model = scene.arm.create_pinocchio_model()
        names = [link.name for link in scene.arm.links]
        self.tip = names.index(scene.robot.tip)
        fingers = {drive.joint for drive in scene.robot.fingers}
        self.moving = np.array([joint.name not in fingers for joint in scene.arm.active_joints], np.int32)

    def pose(self) -> Pose:
        """Of the measured joints."""
        self.model.compute_forward_kinematics(self.scene.arm.qpos)
        return pose_of(self.model.get_link_pose(self.tip))

    def solve(self, pose: Pose) -> tuple[np.ndarray, bool]:
        """Joints, searched from the measured ones, and whether they reach the pose. Limits are ignored."""
        joints, reached, _ = self.model.compute_inverse_kinematics(
            self.tip,
            sapien_pose(pose),
            self.scene.arm.qpos,
            self.moving,
            IK_TOLERANCE,
            IK_ITERATIONS,
            IK_STEP,
            IK_DAMPING,
        )
        return np.asarray(joints, float)[self.scene.order], bool(reached)


class WidowXControl:
    """Actions add to the target pose; it turns about where the tip is, not about where it should be."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.kinematics = scene, Kinematics(scene)

    def reset(self) -> None:
        self.target = self.kinematics.pose()

    def act(self, action: np.ndarray) -> None:
        measured = self.kinematics.pose()[:3]
        turn = turn_of(action[3:6])
        arm = self.target[:3] - measured
        place = measured + action[:3] + matrix(turn) @ arm
        self.target = np.concatenate([place, multiplied(turn, self.target[3:])])
        joints, reached = self.kinematics.solve(self.target)
        if not reached:  # the arm stays, the target does not: it is left when later actions come back
            joints = self.scene.joint_places()
        joints[-2:] = 0.026 + 0.012 * np.clip(action[6], -1, 1)
        for joint, value in enumerate(joints):
            self.scene.drive(joint, value)

    def substep(self, index: int) -> None:
        """All targets are set at once."""


class GoogleControl:
    """Targets start at the measured pose. Joints follow the fastest plan of bounded jerk, made in each step.

    The plans of arm and head begin where the last ones ended; the fingers' begin where the fingers are.
    """

    ARM = (1.5, 2.0, 50.0)  # limits of speed, acceleration and jerk: rad/s, rad/s², rad/s³
    FINGERS = (1.0, 7.0, 50.0)
    CHANGE = 1.31  # rad, of a finger's target for a whole action

    def __init__(self, scene: Scene) -> None:
        self.scene, self.kinematics = scene, Kinematics(scene)
        names = [drive.joint for drive in scene.robot.drives]
        self.arm = [place for place, name in enumerate(names) if "finger" not in name]
        self.fingers = [place for place, name in enumerate(names) if "finger" in name]

    def reset(self) -> None:
        self.arm_plan: Any = None
        self.finger_plan: Any = None
        self.sent = self.scene.joint_places()[self.fingers]
        self.wanted = self.sent

    def act(self, action: np.ndarray) -> None:
        tip = self.kinematics.pose()
        turn = turn_of(action[3:6])
        goal = np.concatenate([tip[:3] + action[:3], multiplied(turn, tip[3:])])
        joints, reached = self.kinematics.solve(goal)
        places, speeds = self.scene.joint_places(), self.scene.joint_speeds()
        if not reached:
            joints = places
        if self.arm_plan is None:
            start, speed = places[self.arm], np.clip(speeds[self.arm], -self.ARM[0], self.ARM[0])
        else:
            start, speed = self.arm_plan[0][-1], self.arm_plan[1][-1]
        self.arm_plan = self._plan(start, speed, joints[self.arm], self.ARM)

        change = self.CHANGE * np.clip(action[6], -1, 1)
        if abs(change) >= 0.001:
            self.wanted = np.clip(self.sent + change, -0.0001 - 0.01, 1.3 + 0.01)
        start = places[self.fingers]
        speed = np.clip(speeds[self.fingers], -self.FINGERS[0], self.FINGERS[0])
        if self.finger_plan is not None:
            # On SAPIEN 2 a stopped finger still reports speed, so that its next plan goes on pressing.
            ends, goes = self.finger_plan[0][-1], self.finger_plan[1][-1]
            stopped = (abs(ends - start) > LAG) & (start > LAG) & (start < TIPS_MEET - LAG)
            speed = np.where(stopped, goes, speed)
            self.scene.gripping = bool(stopped.any()) and bool(self.scene.objects)
        self.finger_plan = self._plan(start, speed, self.wanted, self.FINGERS)

    def _plan(
        self, start: np.ndarray, speed: np.ndarray, goal: np.ndarray, limits: tuple[float, float, float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places and speeds [substeps + 1, joints] of the plan, sampled before and after each sub-step."""
        from ruckig import InputParameter, Ruckig, Trajectory

        size = len(start)
        wanted = InputParameter(size)
        wanted.current_position, wanted.current_velocity = list(start), list(speed)
        wanted.current_acceleration = wanted.target_velocity = wanted.target_acceleration = [0.0] * size
        wanted.target_position = list(goal)
        wanted.max_velocity, wanted.max_acceleration, wanted.max_jerk = ([limit] * size for limit in limits)
        plan = Trajectory(size)
        result = Ruckig(size).calculate(wanted, plan)
        if result not in (0, 1):  # Working, Finished
            raise RuntimeError(f"no plan from {start}, {speed} to {goal}: {result}")
        times = np.arange(self.scene.robot.substeps + 1) / self.scene.rate
        samples = [plan.at_time(min(time, plan.duration)) for time in times]
        return np.array([sample[0] for sample in samples]), np.array([sample[1] for sample in samples])

    def substep(self, index: int) -> None:
        places, speeds = self.finger_plan
        for joint, value in zip(self.arm, self.arm_plan[0][index]):
            self.scene.drive(joint, value)
        for joint, value, speed in zip(self.fingers, places[index], speeds[index]):
            self.scene.drive(joint, value, speed)
        self.sent = places[index]


def control_of(scene: Scene) -> Control:
    return GoogleControl(scene) if scene.task.robot == "google" else WidowXControl(scene)
