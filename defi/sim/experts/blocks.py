"""Experts for the blocks: push, lift, turn, place, stack, unstack, and push into the drawer.

A skill is made for the situation at its start: which block is held, how a block lay.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from defi.sim.experts.motion import (
    CLOSED,
    OPEN,
    OVER_DOOR,
    TIP,
    Block,
    Move,
    Point,
    Skill,
    View,
    descend,
    wrap,
)
from defi.sim.panda import FINGER_WIDTH
from defi.sim.scene import BLOCKS, Vector
from defi.sim.table import BLOCK_HEIGHT, HANDLE_TOP, TOP

CLOSED_FINGERS = 0.02  # metres from the TCP to the outside of closed fingers
OPEN_FINGERS = 0.065  # … of open ones, with some room
HELD = 0.055  # metres between fingers that hold a block, at most
REACH = 0.025  # metres from the TCP to a block between the fingers, at most
BEFORE_KNOB = -0.058  # y up to which the hand can come down over the table
OVER_TABLE = 0.535  # height of the TCP that clears blocks on the table
OVER_BLOCKS = 0.55  # height of a carried block's middle that clears others
OVER_DRAWER = HANDLE_TOP + 0.05
# Where to put a block in each half of the shelf: its middle; if a block is there, nearer to the other half.
SHELF_PLACES = {"left": ((-0.24, 0.092), (-0.13, 0.092)), "right": ((0.07, 0.092), (-0.04, 0.092))}


def clearance(place: Point) -> float:
    """Height of the TCP on its way to or from a block at `place`, without one in the hand."""
    if place[1] > 0.0:
        return OVER_DOOR
    return OVER_TABLE if place[2] > TOP else OVER_DRAWER


def between(view: View, name: str) -> bool:
    """Whether the block is between the fingers."""
    return bool(np.linalg.norm(view.blocks[name].place - view.tcp) < REACH)


def held(view: View, name: str) -> bool:
    return between(view, name) and view.width < HELD


def nearest_block(view: View) -> str:
    return min(view.blocks, key=lambda name: np.linalg.norm(view.blocks[name].place - view.tcp))


def neighbours(view: View, name: str) -> list[Block]:
    """Other blocks that lie at the height of this one."""
    height = view.blocks[name].place[2]
    return [
        block
        for other, block in view.blocks.items()
        if other != name and abs(block.place[2] - height) < BLOCK_HEIGHT
    ]


def crowded(view: View, name: str, yaw: float) -> bool:
    """Whether open fingers at this yaw of the hand would come down on another block."""
    apart = np.array([np.sin(yaw), -np.cos(yaw)])  # the direction in which the fingers open
    along = np.array([-apart[1], apart[0]])
    for block in neighbours(view, name):
        offset = (block.place - view.blocks[name].place)[:2]
        across = abs(offset @ along) - block.half(yaw) < FINGER_WIDTH / 2
        if across and abs(offset @ apart) - block.half(yaw - np.pi / 2) < OPEN_FINGERS:
            return True
    return False


def grip_yaw(view: View, name: str) -> float:
    """The hand's yaw that puts the fingers on the block's long sides, nearest to straight.

    A cube may be taken the other way, if there is more room.
    """
    block = view.blocks[name]

    def straight(yaw: float) -> float:
        return float(np.pi / 2 + wrap(2 * (yaw - np.pi / 2)) / 2)

    first, second = straight(block.yaw), straight(block.yaw + np.pi / 2)
    if block.length > BLOCK_HEIGHT:
        return first
    near, far = sorted((first, second), key=lambda yaw: abs(yaw - np.pi / 2))
    return far if crowded(view, name, near) and not crowded(view, name, far) else near


def grasp(view: View, name: str) -> Move:
    """Over the block with open fingers, down, close; push it out of a crowd first."""
    place = view.blocks[name].place
    yaw = grip_yaw(view, name)
    turned = abs(float(wrap(view.euler[2] - yaw)))
    aligned = np.linalg.norm((place - view.tcp)[:2]) < 0.012 and abs(place[2] - view.tcp[2]) < 0.012
    if held(view, name) or aligned:
        return Move(view.tcp, gripper=CLOSED, yaw=yaw)
    if place[1] < 0 and place[2] < TOP + 0.03 and crowded(view, name, yaw):
        return push(view, name, np.array([0.0, 1.0]))
    goal = np.array([*place[:2], place[2] + 0.002])
    if turned > 0.25 and view.tcp[2] > place[2] + 0.05:
        goal[2] = clearance(place)
    return Move(descend(view.tcp, goal, clearance(place), near=0.02), gripper=OPEN, yaw=yaw, turn=True)


def push(view: View, name: str, direction: Float[np.ndarray, "2"]) -> Move:
    """Come down behind the block with closed fingers, then push it; they follow its middle.

    If another block lies where the fingers would come down, they push that one against it.
    """
    angle = float(np.arctan2(direction[1], direction[0]))
    across = np.array([-direction[1], direction[0]])
    finger = CLOSED_FINGERS * abs(direction[0]) + FINGER_WIDTH / 2 * abs(direction[1])
    block = view.blocks[name]
    for other in neighbours(view, name):
        offset = (block.place - other.place)[:2]
        gap = offset @ direction - block.half(angle) - other.half(angle)
        if abs(offset @ across) < 0.05 and -0.02 < gap < 2 * finger + 0.01:
            block = other
    reach = block.half(angle) + finger
    offset = (block.place - view.tcp)[:2]
    low = TOP + 0.008 + TIP
    if view.tcp[2] < low + 0.02 and 0 < offset @ direction < reach + 0.07 and abs(offset @ across) < 0.025:
        goal = view.tcp[:2] + 0.1 * direction + across * (offset @ across)
        return Move(np.array([*goal, low]), speed=0.6)
    goal = block.place[:2] - (reach + 0.033) * direction
    goal[1] = min(goal[1], BEFORE_KNOB)
    return Move(descend(view.tcp, np.array([*goal, low]), OVER_TABLE, near=0.025))


def let_go(view: View, name: str) -> Move:
    """Get rid of a block in the hand that the task does not ask for: put it on the table, open, rise."""
    place = view.blocks[name].place
    if view.width > HELD:
        return Move(view.tcp + Skill.leave, gripper=OPEN)
    if place[2] < TOP + 0.03:
        return Move(view.tcp, gripper=OPEN, yaw=float(view.euler[2]))
    return Move(view.tcp + descend(place, _free_spot(view, name), clear=OVER_BLOCKS, near=0.015) - place)


def _free_spot(view: View, name: str) -> Point:
    """Where to put a block on the table: far from the others there, just above it."""
    others = [
        block.place[0]
        for other, block in view.blocks.items()
        if other != name and block.place[1] < 0 and block.place[2] < TOP + 0.03
    ]
    spot = max((0.05, 0.14, 0.23), key=lambda x: min((abs(x - other) for other in others), default=0))
    return np.array([spot, -0.11, TOP + 0.025])


@dataclass(frozen=True)
class Push(Skill):
    """Beside the block with closed fingers, then along x; the fingers follow the block's middle."""

    name: str
    side: int  # +1: to the right
    start: float  # the block's x at the start
    distance = 0.104

    @property
    def leave(self) -> Vector:
        return (-0.04 * self.side, 0.0, 0.1)

    def done(self, view: View) -> bool:
        return self.side * (view.blocks[self.name].place[0] - self.start) > self.distance

    def move(self, view: View) -> Move:
        return push(view, self.name, np.array([float(self.side), 0.0]))


@dataclass(frozen=True)
class Lift(Skill):
    """Grasp the block and raise it."""

    name: str
    start: float  # the block's height at the start
    rise: float
    leave = (0.0, 0.0, 0.05)

    @property
    def block(self) -> str:
        return self.name

    def done(self, view: View) -> bool:
        return held(view, self.name) and view.blocks[self.name].place[2] > self.start + self.rise

    def move(self, view: View) -> Move:
        if held(view, self.name):
            return Move(view.tcp + Skill.leave, yaw=float(view.euler[2]))
        return grasp(view, self.name)


@dataclass(frozen=True)
class Rotate(Skill):
    """Grasp the block, turn it with the hand where it lies, let go."""

    name: str
    side: int  # +1: to the left, counterclockwise
    start: float  # the block's yaw at the start
    middle: float  # y to which the block is drawn meanwhile, for the hand to clear the door's knob
    leave_gripper = OPEN
    angle = np.radians(68)

    @property
    def block(self) -> str:
        return self.name

    def _turned(self, view: View) -> float:
        return self.side * float(wrap(view.blocks[self.name].yaw - self.start))

    def done(self, view: View) -> bool:
        return self._turned(view) > self.angle and view.width > HELD

    def move(self, view: View) -> Move:
        if self._turned(view) > self.angle:
            return Move(view.tcp, gripper=OPEN, yaw=float(view.euler[2]))
        if held(view, self.name):
            goal = np.array([view.tcp[0], min(view.tcp[1], self.middle), TOP + 0.022])
            return Move(goal, yaw=float(view.euler[2]) + self.side * 0.15, turn=True)
        return grasp(view, self.name)


@dataclass(frozen=True)
class Place(Skill):
    """Carry the held block over a place, lower it, let go."""

    name: str
    where: Callable[[View], Point]  # where the block's middle should be when the fingers open
    clear: float  # height of the block's middle on its way
    leave: Vector = Skill.leave
    leave_gripper = OPEN

    @property
    def block(self) -> str:
        return self.name

    def done(self, view: View) -> bool:
        offset = view.blocks[self.name].place - self.where(view)
        there = np.hypot(*offset[:2]) < 0.06 and offset[2] < 0.02
        return bool(there and view.width > HELD)

    def move(self, view: View) -> Move:
        yaw = float(np.pi / 2)
        place = view.blocks[self.name].place
        goal = self.where(view)
        if np.hypot(*(place - goal)[:2]) < 0.02 and abs(place[2] - goal[2]) < 0.012:
            return Move(view.tcp, gripper=OPEN, yaw=float(view.euler[2]))
        if not held(view, self.name):
            return grasp(view, self.name)
        carried = descend(place, goal, self.clear, near=0.015, travel=self.clear)
        return Move(view.tcp + carried - place, yaw=yaw)


@dataclass(frozen=True)
class PushIntoDrawer(Skill):
    """From behind the block, push it over the table's front edge, after moving it to where the drawer is."""

    name: str

    def done(self, view: View) -> bool:
        return view.blocks[self.name].place[2] < TOP - 0.04

    def move(self, view: View) -> Move:
        place = view.blocks[self.name].place
        drawer = view.grips["base__drawer"][0]
        beside = np.clip(place[0] - drawer, -0.05, 0.05) + drawer - place[0]
        if abs(beside) > 0.005:
            return push(view, self.name, np.array([np.sign(beside), 0.0]))
        return push(view, self.name, np.array([0.0, -1.0]))


def _over_drawer(view: View) -> Point:
    gap = view.grips["base__drawer"]
    return np.array([gap[0], gap[1] + 0.155, 0.36])


def _on_shelf(start: View) -> Callable[[View], Point]:
    """A free place in the half of the shelf that the door leaves open."""
    places = SHELF_PLACES["right" if start.joints["base__slide"] > 0.14 else "left"]
    on_shelf = [
        block.place for block in start.blocks.values() if block.place[1] > 0 and block.place[2] < TOP + 0.05
    ]

    def room(place: tuple[float, float]) -> float:
        return min((float(np.hypot(*(place - other[:2]))) for other in on_shelf), default=1.0)

    place = places[0] if room(places[0]) > 0.07 else max(places, key=room)
    return lambda _: np.array([*place, TOP + 0.03])


def _stack(start: View) -> Place:
    name = nearest_block(start)
    low = {
        other: block.place
        for other, block in start.blocks.items()
        if other != name and block.place[1] < 0 < block.place[2] - TOP
    }
    below = min(low, key=lambda other: np.linalg.norm(low[other] - start.tcp))
    return Place(name, lambda view: view.blocks[below].place + (0, 0, 0.043), clear=OVER_BLOCKS)


def _unstack(start: View) -> Place:
    """Put the highest block on the table."""
    name = max(start.blocks, key=lambda name: start.blocks[name].place[2])
    spot = _free_spot(start, name)
    return Place(name, lambda _: spot, clear=OVER_BLOCKS)


def _pushable(start: View) -> str:
    """The block on the table nearest to the middle of the drawer."""
    drawer = start.grips["base__drawer"][0]
    on_table = [name for name, block in start.blocks.items() if block.place[2] > TOP and block.place[1] < 0]
    return min(on_table or BLOCKS, key=lambda name: abs(start.blocks[name].place[0] - drawer))


def _block_skills(color: str) -> dict[str, Callable[[View], Skill]]:
    name = f"block_{color}"
    skills: dict[str, Callable[[View], Skill]] = {}
    for side, sign in (("right", 1), ("left", -1)):
        skills[f"push_{color}_block_{side}"] = lambda start, sign=sign: Push(
            name, sign, start.blocks[name].place[0]
        )
        skills[f"rotate_{color}_block_{side}"] = lambda start, sign=sign: Rotate(
            name, -sign, start.blocks[name].yaw, start.blocks[name].place[1] - 0.025
        )
    for place, rise in (("table", 0.06), ("slider", 0.04), ("drawer", 0.07)):
        skills[f"lift_{color}_block_{place}"] = lambda start, rise=rise: Lift(
            name, start.blocks[name].place[2], rise
        )
    return skills


BLOCK_SKILLS: dict[str, Callable[[View], Skill]] = {
    **_block_skills("red"),
    **_block_skills("blue"),
    **_block_skills("pink"),
    "place_in_drawer": lambda start: Place(nearest_block(start), _over_drawer, clear=0.5),
    "place_in_slider": lambda start: Place(
        nearest_block(start), _on_shelf(start), clear=OVER_DOOR + 0.01, leave=(0.0, 0.0, 0.19)
    ),
    "stack_block": _stack,
    "unstack_block": _unstack,
    "push_into_drawer": lambda start: PushIntoDrawer(_pushable(start)),
}
