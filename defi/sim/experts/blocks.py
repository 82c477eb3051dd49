"""Experts for the blocks: push, lift, turn, place, stack, unstack, and push into the drawer.

A skill is made for the situation at its start: which block is held, how a block lay.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from defi.sim.experts.motion import CLOSED, OPEN, OVER_DOOR, TIP, Move, Point, View, descend, wrap
from defi.sim.scene import BLOCKS, Vector
from defi.sim.table import HANDLE_TOP, TOP

HELD = 0.055  # metres between fingers that hold a block, at most
REACH = 0.025  # metres from the TCP to a block between the fingers, at most
OVER_TABLE = 0.535  # height of the TCP that clears blocks on the table
OVER_DRAWER = HANDLE_TOP + 0.05
UP = (0.0, 0.0, 0.1)
# Where to put a block in each half of the shelf: in its middle, or, if a block is there, nearer to the other half.
SHELF_PLACES = {"left": ((-0.24, 0.092), (-0.145, 0.092)), "right": ((0.07, 0.092), (-0.025, 0.092))}


def clearance(place: Point) -> float:
    """Height of the TCP on its way to or from a block at `place`, without one in the hand."""
    if place[1] > 0.0:
        return OVER_DOOR
    return OVER_TABLE if place[2] > TOP else OVER_DRAWER


def between(view: View, name: str) -> bool:
    """Whether the block is between the fingers."""
    return bool(np.linalg.norm(view.blocks[name][0] - view.tcp) < REACH)


def held(view: View, name: str) -> bool:
    return between(view, name) and view.width < HELD


def nearest_block(view: View) -> str:
    return min(view.blocks, key=lambda name: np.linalg.norm(view.blocks[name][0] - view.tcp))


def grip_yaw(view: View, name: str) -> float:
    """The hand's yaw that puts the fingers on the block's long sides, nearest to straight."""
    yaw = view.blocks[name][1][2] - np.pi / 2
    return float(np.pi / 2 + (yaw + np.pi / 2) % np.pi - np.pi / 2)


def grasp(view: View, name: str) -> Move:
    """Over the block with open fingers, down, close."""
    place = view.blocks[name][0]
    yaw = grip_yaw(view, name)
    turned = abs(float(wrap(view.euler[2] - yaw)))
    aligned = np.linalg.norm((place - view.tcp)[:2]) < 0.012 and abs(place[2] - view.tcp[2]) < 0.012
    if held(view, name) or aligned:
        return Move(view.tcp, gripper=CLOSED, yaw=yaw)
    goal = np.array([*place[:2], place[2] + 0.002])
    if turned > 0.25 and view.tcp[2] > place[2] + 0.05:
        goal[2] = clearance(place)
    return Move(descend(view.tcp, goal, clearance(place), near=0.02), gripper=OPEN, yaw=yaw, turn=True)


@dataclass(frozen=True)
class Push:
    """Beside the block with closed fingers, then along x; the fingers follow the block's middle."""

    name: str
    side: int  # +1: to the right
    start: float  # the block's x at the start
    leave = UP
    leave_gripper = CLOSED
    distance = 0.118
    behind = 0.085

    def done(self, view: View) -> bool:
        return self.side * (view.blocks[self.name][0][0] - self.start) > self.distance

    def move(self, view: View) -> Move:
        place = view.blocks[self.name][0]
        low = TOP + 0.012 + TIP
        offset = self.side * (place - view.tcp)[0]
        across = abs(place[1] - view.tcp[1])
        if view.tcp[2] < low + 0.02 and 0 < offset < self.behind + 0.02 and across < 0.025:
            return Move(np.array([view.tcp[0] + self.side * 0.1, place[1], low]), speed=0.6)
        goal = np.array([place[0] - self.side * self.behind, place[1], low])
        return Move(descend(view.tcp, goal, OVER_TABLE, near=0.025))


@dataclass(frozen=True)
class Lift:
    """Grasp the block and raise it."""

    name: str
    start: float  # the block's height at the start
    rise: float
    leave = (0.0, 0.0, 0.05)
    leave_gripper = CLOSED

    def done(self, view: View) -> bool:
        return held(view, self.name) and view.blocks[self.name][0][2] > self.start + self.rise

    def move(self, view: View) -> Move:
        if held(view, self.name):
            return Move(view.tcp + UP, yaw=float(view.euler[2]))
        return grasp(view, self.name)


@dataclass(frozen=True)
class Rotate:
    """Grasp the block, turn it with the hand where it lies, let go."""

    name: str
    side: int  # +1: to the left, counterclockwise
    start: float  # the block's yaw at the start
    middle: float  # y to which the block is drawn meanwhile, for the hand to clear the door's knob
    leave = UP
    leave_gripper = OPEN
    angle = np.radians(68)

    def _turned(self, view: View) -> float:
        return self.side * float(wrap(view.blocks[self.name][1][2] - self.start))

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
class Place:
    """Carry the held block over a place, lower it, let go."""

    name: str
    where: Callable[[View], Point]  # where the block's middle should be when the fingers open
    clear: float  # height of the block's middle on its way
    leave: Vector = UP
    leave_gripper = OPEN

    def done(self, view: View) -> bool:
        offset = view.blocks[self.name][0] - self.where(view)
        there = np.hypot(*offset[:2]) < 0.06 and offset[2] < 0.02
        return bool(there and view.width > HELD)

    def move(self, view: View) -> Move:
        yaw = float(np.pi / 2)
        place = view.blocks[self.name][0]
        goal = self.where(view)
        if np.hypot(*(place - goal)[:2]) < 0.02 and abs(place[2] - goal[2]) < 0.012:
            return Move(view.tcp, gripper=OPEN, yaw=float(view.euler[2]))
        if not held(view, self.name):
            return grasp(view, self.name)
        carried = descend(place, goal, self.clear, near=0.015, travel=self.clear)
        return Move(view.tcp + carried - place, yaw=yaw)


@dataclass(frozen=True)
class PushIntoDrawer:
    """From behind the block, push it over the table's front edge; first beside it, if the drawer is not below."""

    name: str
    leave = UP
    leave_gripper = CLOSED

    def done(self, view: View) -> bool:
        return view.blocks[self.name][0][2] < TOP - 0.04

    def move(self, view: View) -> Move:
        place = view.blocks[self.name][0]
        drawer = view.grips["base__drawer"][0]
        low = TOP + 0.012 + TIP
        beside = np.clip(place[0] - drawer, -0.1, 0.1) + drawer - place[0]
        if abs(beside) > 0.005:
            side = int(np.sign(beside))
            return Push(self.name, side, start=place[0]).move(view)
        offset = view.tcp - place
        if view.tcp[2] < low + 0.02 and abs(offset[0]) < 0.025 and 0 < offset[1] < 0.085:
            return Move(np.array([place[0], view.tcp[1] - 0.1, low]), speed=0.6)
        goal = np.array([place[0], min(place[1] + 0.065, -0.058), low])
        return Move(descend(view.tcp, goal, OVER_TABLE, near=0.025))


def _over_drawer(view: View) -> Point:
    gap = view.grips["base__drawer"]
    return np.array([gap[0], gap[1] + 0.155, 0.36])


def _on_shelf(start: View) -> Callable[[View], Point]:
    """A free place in the half of the shelf that the door leaves open."""
    places = SHELF_PLACES["right" if start.joints["base__slide"] > 0.14 else "left"]
    on_shelf = [pose[0] for pose in start.blocks.values() if pose[0][1] > 0 and pose[0][2] < TOP + 0.05]

    def room(place: tuple[float, float]) -> float:
        return min((float(np.hypot(*(place - other[:2]))) for other in on_shelf), default=1.0)

    place = places[0] if room(places[0]) > 0.07 else max(places, key=room)
    return lambda _: np.array([*place, TOP + 0.03])


def _stack(start: View) -> Place:
    name = nearest_block(start)
    low = {
        other: pose[0]
        for other, pose in start.blocks.items()
        if other != name and pose[0][1] < 0 < pose[0][2] - TOP
    }
    below = min(low, key=lambda other: np.linalg.norm(low[other] - start.tcp))
    return Place(name, lambda view: view.blocks[below][0] + (0, 0, 0.043), clear=0.56)


def _upper(start: View) -> str:
    """The block highest above another."""
    return max(start.blocks, key=lambda name: start.blocks[name][0][2])


def _pushable(start: View) -> str:
    """The block on the table nearest to the middle of the drawer."""
    drawer = start.grips["base__drawer"][0]
    on_table = [name for name, pose in start.blocks.items() if pose[0][2] > TOP and pose[0][1] < 0]
    return min(on_table or BLOCKS, key=lambda name: abs(start.blocks[name][0][0] - drawer))


def _block_skills(color: str) -> dict[str, Callable[[View], object]]:
    name = f"block_{color}"
    skills: dict[str, Callable[[View], object]] = {}
    for side, sign in (("right", 1), ("left", -1)):
        skills[f"push_{color}_block_{side}"] = lambda start, sign=sign: Push(
            name, sign, start.blocks[name][0][0]
        )
        skills[f"rotate_{color}_block_{side}"] = lambda start, sign=sign: Rotate(
            name, -sign, start.blocks[name][1][2], start.blocks[name][0][1] - 0.025
        )
    for place, rise in (("table", 0.06), ("slider", 0.04), ("drawer", 0.07)):
        skills[f"lift_{color}_block_{place}"] = lambda start, rise=rise: Lift(
            name, start.blocks[name][0][2], rise
        )
    return skills


BLOCK_SKILLS: dict[str, Callable[[View], object]] = {
    **_block_skills("red"),
    **_block_skills("blue"),
    **_block_skills("pink"),
    "place_in_drawer": lambda start: Place(nearest_block(start), _over_drawer, clear=0.5),
    "place_in_slider": lambda start: Place(
        nearest_block(start), _on_shelf(start), clear=OVER_DOOR + 0.01, leave=(0.0, 0.0, 0.19)
    ),
    "stack_block": _stack,
    "unstack_block": lambda start: Lift(_upper(start), start.blocks[_upper(start)][0][2], 0.03),
    "push_into_drawer": lambda start: PushIntoDrawer(_pushable(start)),
}
