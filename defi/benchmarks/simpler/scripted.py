"""Scripted policies (oracles) for SIMPLER's tasks: `scripted(simpler, random)` picks one by the task.

They steer by the true state alone, never by a clock: a picture determines the action, and a disturbed arm
returns. Lengths in metres, angles in radians, in the frame of the robot's base.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.poses import composed, inverse, matrix
from defi.benchmarks.simpler.scene import pose_of

Point = Float[np.ndarray, "3"]

OPEN, CLOSED = 1.0, -1.0

GAIN = 0.6  # of the remaining way, per step
BRAKE = 0.5  # of the way that the tip will still go by itself: it lags behind its target
STEP, TURN = 0.025, 0.15  # of one action, at most
LEAD = 0.045  # how far the target may be ahead of the tip when something holds it
WIDE, EMPTY = 0.033, 0.0158  # a finger's joint: more is open, less holds nothing
REACH = 0.03  # from the tip to an object between the fingers, at most
CLEAR = 0.06  # the tip over where it grasps, before it comes down
RISEN = 0.06  # the tip over the source when all is done


class Scripted(Protocol):
    """Solves the episode that the world was reset to."""

    done: bool  # released, and the hand out of the way

    def action(self) -> Float[np.ndarray, "7"]:
        """The next action, asked for before each step."""


@dataclass(frozen=True)
class Put:
    """How a source is put on a target. Heights are between middles (centres of mass), or from one to the tip.

    grasp: the tip over the source. carry, release: the source over the target on the way, and when it is let
    go. near: how far beside the target it may be then; on: how far when it is let go and stays there. along:
    how far from its middle it may be grasped. low: the hand turns to between this and `low + symmetry`, by
    which the source can be turned and is grasped alike.
    """

    grasp: float
    carry: float
    release: float
    near: float
    on: float
    along: float = 0.012
    low: float = -0.75 * np.pi
    symmetry: float = np.pi


SKILLS = {
    "widowx_carrot_on_plate": Put(grasp=-0.002, carry=0.07, release=0.03, near=0.012, on=0.05),
    "widowx_spoon_on_towel": Put(grasp=0.008, carry=0.06, release=0.025, near=0.012, on=0.05),
    "widowx_stack_cube": Put(
        grasp=0.004,
        carry=0.075,
        release=0.033,
        near=0.006,
        on=0.02,
        along=0.004,
        low=-np.pi / 4,
        symmetry=np.pi / 2,
    ),
    "widowx_put_eggplant_in_basket": Put(
        grasp=-0.002, carry=0.165, release=0.09, near=0.02, on=0.07, low=-np.pi / 2
    ),
}


class PutOn:
    """A WidowX that grasps the source from above, carries it over the target and lets go."""

    def __init__(self, simpler: Simpler, random: np.random.Generator) -> None:
        self.simpler, self.skill = simpler, SKILLS[simpler.episode.task.name]
        self.clear = CLEAR + random.uniform(0, 0.015)
        self.carry = self.skill.carry + random.uniform(0, 0.015)
        self.step = STEP * random.uniform(0.85, 1.0)
        self._look()

    def _look(self) -> None:
        """The state as the policy takes it."""
        simpler, scene = self.simpler, self.simpler.scene
        self.tip = simpler.tip
        self.width = float(scene.joint_places()[-2:].mean())
        self.closing = bool(scene.joint_speeds()[-2:].mean() < -0.005)
        world = inverse(pose_of(scene.arm.root_pose))
        poses, middles = [], []
        for place in (simpler.episode.source, simpler.episode.target):
            body = scene.objects[simpler.episode.objects[place].model]
            poses.append(composed(world, pose_of(body.entity.pose)))
            middles.append(composed(poses[-1], pose_of(body.cmass_local_pose))[:3])
        self.source, self.target = middles
        axis = matrix(poses[0][3:])[:, 0]
        self.source_yaw = float(np.arctan2(axis[1], axis[0]))

    def _placed(self, within: float) -> bool:
        offset = self.source - self.target
        return bool(np.hypot(*offset[:2]) < within and offset[2] < self.skill.release)

    @property
    def done(self) -> bool:
        self._look()
        return self._placed(self.skill.on) and self.width > WIDE and self.tip[2] - self.source[2] > RISEN

    def action(self) -> Float[np.ndarray, "7"]:
        self._look()
        skill, tip = self.skill, self.tip[:3]
        gap = tip - self.source
        between = np.linalg.norm(gap) < REACH
        fingers_open = self.width > WIDE
        if self._placed(skill.on if fingers_open else skill.near):
            if not fingers_open:
                return self._move(tip, OPEN)
            return self._move(np.array([*tip[:2], self.source[2] + RISEN + 0.05]), OPEN)
        if between and self.closing and self.width < WIDE:
            return self._move(tip, CLOSED)
        if between and EMPTY < self.width < WIDE:
            goal = self.target + (0, 0, skill.release - 0.01)
            return self._move(
                tip + self._over(self.source, goal, self.carry - skill.release, skill.near) - self.source,
                CLOSED,
            )
        middle = skill.low + skill.symmetry / 2
        yaw = middle + (self.source_yaw - middle + skill.symmetry / 2) % skill.symmetry - skill.symmetry / 2
        goal = self.source + (0, 0, skill.grasp)
        along = np.array([np.cos(yaw), np.sin(yaw), 0])  # the fingers open across
        goal += np.clip((tip - goal) @ along, -skill.along, skill.along) * along
        off, turn = np.abs(tip - goal), abs(yaw - self._yaw())
        slack = 1.0 if fingers_open else 2.5
        if np.hypot(*off[:2]) < 0.01 * slack and off[2] < 0.009 * slack and turn < 0.15 * slack:
            return self._move(tip, CLOSED)
        return self._move(self._over(tip, goal, self.clear, 0.008, turn), OPEN, yaw)

    def _yaw(self) -> float:
        """0: the fingers open along y."""
        across = matrix(self.tip[3:])[:, 1]
        return float(np.arctan2(-across[0], across[1]))

    def _over(self, place: Point, goal: Point, clear: float, near: float, turn: float = 0.0) -> Point:
        """A waypoint towards the goal from above: `clear` over it, and down as it is near."""
        distance = float(np.hypot(*(goal - place)[:2]))
        up = np.clip(max((distance - near) / 0.02, (turn - 0.1) / 0.2), 0, 1)
        waypoint = goal + (0, 0, clear * up)
        free = np.clip((place[2] - waypoint[2] + 0.03) / 0.02, 0, 1) if distance > 2 * near else 1
        waypoint[:2] = place[:2] + free * (goal - place)[:2]
        return waypoint

    def _move(self, goal: Point, gripper: float, yaw: float | None = None) -> Float[np.ndarray, "7"]:
        """The action towards a place of the tip, with the hand pointing down."""
        from scipy.spatial.transform import Rotation  # takes a while

        step = GAIN * (goal - self.tip[:3] - BRAKE * (self.simpler.control.target[:3] - self.tip[:3]))
        step *= min(1.0, self.step / max(np.linalg.norm(step), 1e-9))
        lead = self.simpler.control.target[:3] - self.tip[:3]
        step = np.clip(lead + step, -LEAD, LEAD) - lead
        down = Rotation.from_euler("ZY", [self._yaw() if yaw is None else yaw, np.pi / 2])
        turn = GAIN * (down * Rotation.from_matrix(matrix(self.tip[3:])).inv()).as_rotvec()
        turn *= min(1.0, TURN / max(np.linalg.norm(turn), 1e-9))
        return np.array([*step, *turn, gripper])


def scripted(simpler: Simpler, random: np.random.Generator) -> Scripted:
    """The policy for the episode that `simpler` was reset to; it varies heights and speed a little."""
    return PutOn(simpler, random)
