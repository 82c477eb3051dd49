"""Scripted policies (oracles) for SIMPLER's tasks: `scripted(simpler, random)` picks one by the task.

They know the true state. What the WidowX does next follows from it, never from a clock or a phase: a
disturbed arm returns. A picture alone does not tell it all: it also depends on speeds of the fingers, on how
far the controller's target is ahead of the tip, and on heights and a speed that each episode draws. Lengths
in metres, angles in radians, in the frame of the robot's base.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from defi.benchmarks.simpler.control import WidowXControl
from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.episodes import yaw
from defi.benchmarks.simpler.poses import composed, inverse, matrix, multiplied, turn_of, vector_of
from defi.benchmarks.simpler.scene import pose_of
from defi.benchmarks.simpler.scripted_google import google

Point = Float[np.ndarray, "3"]
Action = Float[np.ndarray, "7"]

OPEN, CLOSED = 1.0, -1.0
GAIN = 0.6  # of the remaining way, per step
BRAKE = 0.5  # of the way that the tip still goes by itself: it lags behind its target
STEP, TURN = 0.025, 0.15  # of one action, at most
LEAD = 0.045  # how far the target may be ahead of the tip when something holds it
WIDE, EMPTY = 0.033, 0.0158  # a finger's joint: more is open, less holds nothing
CLOSING = 0.005  # m/s, of the fingers together: one that holds only moves with the other
REACH = 0.03  # from the tip to an object between the fingers, at most
CLEAR = 0.06  # the tip over where it grasps, before it comes down
ALIGNED, LEVEL, SLANT = 0.01, 0.009, 0.15  # beside, over and turned from the grasp, at most
RISEN, AWAY = 0.06, 0.11  # the tip over the source when all is done, and where it goes to


class Scripted(Protocol):
    """Solves the episode that the world was reset to."""

    @property
    def done(self) -> bool:
        """It has finished: the object is released, and the hand out of the way."""

    def action(self) -> Action:
        """The next one, in the benchmark's own units; asked for once before each step."""


@dataclass(frozen=True)
class Put:
    """How a source is put on a target. Heights are between middles (centres of mass), or from one to the tip.

    grasp: the tip over the source. carry, release: the source over the target on the way, and when it is let
    go. near: how far beside the target it may be then; on: how far when it is let go and stays there. along:
    how far from its middle it may be grasped. low: the hand turns to between this and `low + symmetry`, by
    which the source can be turned and is grasped alike, and by `most` at most.
    """

    grasp: float
    carry: float
    release: float
    near: float
    on: float
    along: float = 0.012
    low: float = -0.75 * np.pi
    symmetry: float = np.pi
    most: float = np.pi


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
        grasp=-0.002, carry=0.165, release=0.09, near=0.02, on=0.07, low=-np.pi / 2, most=0.9
    ),
}


class View:
    """What a policy sees: the tip, the fingers, the middles of source and target."""

    def __init__(self, simpler: Simpler) -> None:
        scene, episode = simpler.scene, simpler.episode
        self.tip, self.turn = simpler.tip[:3], simpler.tip[3:]
        across = matrix(self.turn)[:, 1]  # the fingers open along it
        self.yaw = float(np.arctan2(-across[0], across[1]))
        self.width = float(scene.joint_places()[-2:].mean())
        self.is_open = self.width > WIDE
        self.closing = not self.is_open and scene.joint_speeds()[-2:].mean() < -CLOSING
        bodies = [scene.objects[episode.objects[place].model] for place in (episode.source, episode.target)]
        world = inverse(pose_of(scene.arm.root_pose))
        poses = [composed(world, pose_of(body.entity.pose)) for body in bodies]
        self.source, self.target = (
            composed(pose, pose_of(body.cmass_local_pose))[:3] for pose, body in zip(poses, bodies)
        )
        along = matrix(poses[0][3:])[:, 0]
        self.source_yaw = float(np.arctan2(along[1], along[0]))
        self.between = bool(np.linalg.norm(self.source - self.tip) < REACH)


class PutOn:
    """A WidowX that grasps the source from above, carries it over the target and lets it go."""

    def __init__(self, simpler: Simpler, random: np.random.Generator) -> None:
        assert isinstance(simpler.control, WidowXControl)
        self.simpler, self.control = simpler, simpler.control
        self.skill = SKILLS[simpler.episode.task.name]
        self.clear = CLEAR + random.uniform(0, 0.015)
        self.carry = self.skill.carry + random.uniform(0, 0.015)
        self.step = STEP * random.uniform(0.85, 1)

    @property
    def done(self) -> bool:
        view = View(self.simpler)
        return view.is_open and self._placed(view) and view.tip[2] - view.source[2] > RISEN

    def _placed(self, view: View) -> bool:
        offset = view.source - view.target
        within = self.skill.on if view.is_open else self.skill.near
        return bool(np.hypot(*offset[:2]) < within and offset[2] < self.skill.release)

    def action(self) -> Action:
        view = View(self.simpler)
        if self._placed(view):
            height = view.source[2] + AWAY if view.is_open else view.tip[2]
            return self._move(view, np.array([*view.tip[:2], height]), OPEN)
        if view.between and view.closing:
            return self._move(view, view.tip, CLOSED)
        if view.between and EMPTY < view.width < WIDE:
            goal = view.target + (0, 0, self.skill.release - 0.01)
            way = over(view.source, goal, self.carry - self.skill.release, self.skill.near) - view.source
            return self._move(view, view.tip + way, CLOSED)
        return self._grasp(view)

    def _grasp(self, view: View) -> Action:
        """Over the source with open fingers, turned across it, down, close."""
        skill = self.skill
        turn = skill.low + (view.source_yaw - skill.low) % skill.symmetry
        turn = float(np.clip(turn, -skill.most, skill.most))
        along = np.array([np.cos(turn), np.sin(turn), 0])
        goal = view.source + (0, 0, skill.grasp)
        goal += np.clip((view.tip - goal) @ along, -skill.along, skill.along) * along
        off, left = np.abs(view.tip - goal), abs(turn - view.yaw)
        slack = 1.0 if view.is_open else 2.5  # what closing fingers push is grasped all the same
        if np.hypot(*off[:2]) < ALIGNED * slack and off[2] < LEVEL * slack and left < SLANT * slack:
            return self._move(view, view.tip, CLOSED)
        waypoint = over(view.tip, goal, self.clear, near=0.008, turn=left)
        return self._move(view, waypoint, OPEN, turn)

    def _move(self, view: View, goal: Point, gripper: float, turn: float | None = None) -> Action:
        """Towards a place of the tip, with the hand pointing down. turn: its yaw; None: as it is."""
        lead = self.control.target[:3] - view.tip
        step = GAIN * (goal - view.tip - BRAKE * lead)
        step *= min(1.0, self.step / max(float(np.linalg.norm(step)), 1e-9))
        step = np.clip(lead + step, -LEAD, LEAD) - lead
        down = multiplied(yaw(view.yaw if turn is None else turn), turn_of((0, np.pi / 2, 0)))
        spin = GAIN * vector_of(multiplied(down, view.turn * (1, -1, -1, -1)))
        spin *= min(1.0, TURN / max(float(np.linalg.norm(spin)), 1e-9))
        return np.array([*step, *spin, gripper])


def over(place: Point, goal: Point, clear: float, near: float, turn: float = 0.0) -> Point:
    """A waypoint from a place to a goal: up to `clear` over it, and down as it is near and hardly turned."""
    way = (goal - place)[:2]
    distance = float(np.hypot(*way))
    height = goal[2] + clear * np.clip(max((distance - near) / 0.02, (turn - 0.1) / 0.2), 0, 1)
    free = 1.0 if distance < 2 * near else np.clip((place[2] - height + 0.03) / 0.02, 0, 1)
    return np.array([*(place[:2] + free * way), height])


def scripted(simpler: Simpler, random: np.random.Generator) -> Scripted:
    """The policy for the episode that `simpler` was reset to; it varies heights and speeds a little."""
    return google(simpler, random) if simpler.episode.task.robot == "google" else PutOn(simpler, random)
