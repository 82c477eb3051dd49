"""What scripted policies see, and how they move: goals for the hand, turned into relative actions.

The action follows from the present state alone, never from a clock: a picture determines it, and a disturbed
arm returns. Lengths in metres, angles in radians, world coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from defi.sim.arm import POSITION_STEP, ROTATION_STEP
from defi.sim.scene import Vector
from defi.sim.scenes import BLOCK_WIDTH, SWITCH_AXIS
from defi.sim.world import World

Point = Float[np.ndarray, "3"]

OPEN, CLOSED = 1.0, -1.0
RISE = (0.0, 0.0, 0.1)  # how the hand leaves what it worked on, unless the skill says otherwise
TIP = 0.0148  # from the TCP down to the tips of the fingers
TRAVEL = 0.56  # height of the TCP on its way over the table
OVER_DOOR = 0.65  # height of the TCP that clears the sliding door and its knob
SHELF_ZONE = -0.03  # y behind which they may be in the way
DOWN = np.array([np.pi, 0.0, np.pi / 2])  # Euler angles of a hand that points down, fingers apart along x
SPEED = 0.85  # of an action's range
GAIN = 0.4  # of the remaining way, per step
LEAD = 0.05  # how far the commanded position may be ahead of the hand when something holds it
SLACK = 0.07  # radians by which the hand may be turned before it is turned back
REACH = 0.025  # metres from the TCP to a block between the fingers, at most
HELD = 0.055  # metres between fingers that hold a block, at most
JOINT_AXES = {
    "base__slide": np.array([-1.0, 0.0, 0.0]),
    "base__drawer": np.array([0.0, -1.0, 0.0]),
    "base__button": np.array([0.0, 0.0, -1.0]),
    "base__switch": np.array(SWITCH_AXIS),
}


@dataclass(frozen=True)
class Block:
    """A block's middle, its yaw and its length along its x axis."""

    place: Point
    yaw: float
    length: float

    def half(self, angle: float) -> float:
        """How far it reaches from its middle in the horizontal direction `angle`."""
        turn = angle - self.yaw
        return self.length / 2 * abs(np.cos(turn)) + BLOCK_WIDTH / 2 * abs(np.sin(turn))


class View:
    """What a policy sees: the hand, the joints and the point to work each of them, the LED, the blocks."""

    def __init__(self, world: World) -> None:
        robot, scene = world.robot_obs(), world.scene_obs()
        self.tcp, self.euler = robot[:3], robot[3:6]
        self.yaw, self.width = float(robot[5]), float(robot[6])  # of the hand, between the fingers
        self.is_open = self.width > HELD  # the fingers hold no block
        self.led = int(scene[5])
        self.joints = {name: float(value) for name, value in zip(JOINT_AXES, scene[:4])}
        grips = world.scene.table.grips
        self.grips = {name: np.array(grips[name]) + self.joints[name] * JOINT_AXES[name] for name in grips}
        poses = zip(world.scene.blocks, np.split(scene[6:], len(world.blocks)))
        self.blocks = {block.name: Block(pose[:3], float(pose[5]), block.length) for block, pose in poses}

    def between(self, name: str) -> bool:
        """Whether the block is between the fingers."""
        return bool(np.linalg.norm(self.blocks[name].place - self.tcp) < REACH)

    def holds(self, name: str) -> bool:
        return self.between(name) and self.width < HELD


@dataclass(frozen=True)
class Move:
    """Where the hand should go from here. `turn`: may also turn by less than `SLACK`."""

    goal: Point
    gripper: float = CLOSED
    yaw: float = float(DOWN[2])
    speed: float = SPEED
    turn: bool = False


@dataclass(frozen=True)
class Skill:
    """How to do one task: the next move, when it is done, and how the hand leaves afterwards."""

    move: Callable[[View], Move]
    done: Callable[[View], bool]
    leave: Vector = RISE  # displacement of the hand
    leave_gripper: float = CLOSED
    block: str | None = None  # that the skill takes into the hand


def wrap(angle: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The same angle in [−π, π)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def action(move: Move, view: View, commanded: Point) -> Float[np.ndarray, "7"]:
    """The relative action in [−1, 1] towards the move's goal, slowing down before it.

    `commanded` is the position that the arm is already moving to; it stays within `LEAD` of the hand.
    """
    step = GAIN * (move.goal - view.tcp) / POSITION_STEP
    step *= min(1.0, move.speed / max(np.linalg.norm(step), 1e-9))
    lead = commanded - view.tcp
    step = (np.clip(lead + step * POSITION_STEP, -LEAD, LEAD) - lead) / POSITION_STEP
    error = wrap(np.array([*DOWN[:2], move.yaw]) - view.euler)
    if not move.turn:
        error = np.sign(error) * np.maximum(np.abs(error) - SLACK, 0)
    turn = np.clip(GAIN * error / ROTATION_STEP, -SPEED, SPEED)
    return np.concatenate([np.clip(step, -1, 1), turn, [move.gripper]])


def descend(tcp: Point, goal: Point, clear: float, near: float = 0.03, travel: float = TRAVEL) -> Point:
    """A waypoint towards `goal` from above: over it at height `clear` or more, then straight down.

    The height rises with the horizontal distance, from `clear` to `travel`, and is at least `OVER_DOOR` on
    the way out of the shelf; below it the hand first rises.
    """
    distance = float(np.hypot(*(goal - tcp)[:2]))
    if distance < near:
        return goal
    height = clear + (max(travel, clear) - clear) * min(1.0, (distance - near) / 0.12)
    if tcp[1] > SHELF_ZONE > goal[1]:
        height = max(height, OVER_DOOR)
    free = np.clip((tcp[2] - height + 0.035) / 0.02, 0, 1)
    waypoint = np.array([*goal[:2], height])
    waypoint[:2] = tcp[:2] + free * (goal - tcp)[:2]
    return waypoint
