"""The judge of the 34 tasks: did what a task asks for happen between two states? Plain data in, yes or no
out.

Contacts are (body, link) pairs of whatever touches a block; "surface" means anything but the robot.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from defi.sim.tasks import COLORS, TASKS, check_task

Contact = tuple[int, int]
Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]

ROTATION = 60.0  # degrees about z
TILT = 30.0  # degrees about x or y, at most, in a rotation
ROTATION_DRIFT = 0.1  # metres, at most, in a rotation
PUSH = 0.1  # metres along x
SLIDE, DRAWER = 0.15, 0.12  # metres
LIFT = {"table": 0.05, "slider": 0.03, "drawer": 0.05}  # metres
SURFACE_LINK = {"table": "base_link", "slider": "plank_link", "drawer": "drawer_link"}
SLOW = 1.0  # m/s and rad/s, in every component, for a stack


@dataclass(frozen=True)
class BlockState:
    """One block: pose (metres, quaternion xyzw), velocities (m/s, rad/s), and what touches it."""

    body: int
    position: Vector
    quaternion: Quaternion
    linear_velocity: Vector
    angular_velocity: Vector
    contacts: frozenset[Contact]

    @property
    def touching(self) -> set[int]:
        """The bodies in contact."""
        return {body for body, _ in self.contacts}

    @property
    def slow(self) -> bool:
        return all(abs(v) < SLOW for v in (*self.linear_velocity, *self.angular_velocity))


@dataclass(frozen=True)
class JudgeState:
    """What the judge sees of a world at one time. `links` maps the table's link names to indices."""

    robot: int
    table: int
    links: Mapping[str, int]
    blocks: Mapping[str, BlockState]
    doors: Mapping[str, float]
    lights: Mapping[str, int]
    robot_contacts: frozenset[Contact]

    def surface(self, place: str) -> Contact:
        """The contact with the table (table), the shelf behind the slide (slider) or the drawer (drawer)."""
        return (self.table, self.links[SURFACE_LINK[place]])


Rule = Callable[[JudgeState, JudgeState], bool]


def _displacement(start: BlockState, end: BlockState) -> Vector:
    x, y, z = (b - a for a, b in zip(start.position, end.position))
    return x, y, z


def rotation_between(start: Quaternion, end: Quaternion) -> Vector:
    """Euler angles (degrees; about fixed x, then y, then z) of the rotation from `start` to `end`."""
    ax, ay, az, aw = (-start[0], -start[1], -start[2], start[3])
    bx, by, bz, bw = end
    x = bw * ax + bx * aw + by * az - bz * ay
    y = bw * ay - bx * az + by * aw + bz * ax
    z = bw * az + bx * ay - by * ax + bz * aw
    w = bw * aw - bx * ax - by * ay - bz * az
    sine = 2 * (w * y - z * x) / (x * x + y * y + z * z + w * w)
    return (
        math.degrees(math.atan2(2 * (w * x + y * z), w * w - x * x - y * y + z * z)),
        math.degrees(math.asin(max(-1.0, min(1.0, sine)))),
        math.degrees(math.atan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z)),
    )


def _rotated(block: str, sign: int, start: JudgeState, end: JudgeState) -> bool:
    """Turned about z, upright, in place, and not only in the robot's hand."""
    before, after = start.blocks[block], end.blocks[block]
    if math.hypot(*_displacement(before, after)) > ROTATION_DRIFT or not after.touching - {start.robot}:
        return False
    x, y, z = rotation_between(before.quaternion, after.quaternion)
    return ROTATION < sign * z < 180 and abs(x) < TILT and abs(y) < TILT


def _pushed(block: str, sign: int, start: JudgeState, end: JudgeState) -> bool:
    """Moved along x without leaving any surface it was on."""
    before, after = start.blocks[block], end.blocks[block]
    surfaces_before = {contact for contact in before.contacts if contact[0] != start.robot}
    surfaces_after = {contact for contact in after.contacts if contact[0] != start.robot}
    on_surface = bool(surfaces_before) and surfaces_before <= surfaces_after
    return on_surface and sign * _displacement(before, after)[0] > PUSH


def _moved_door(door: str, distance: float, start: JudgeState, end: JudgeState) -> bool:
    moved = end.doors[door] - start.doors[door]
    return moved > distance if distance > 0 else moved < distance


def _lifted(block: str, place: str, start: JudgeState, end: JudgeState) -> bool:
    """Off its place, in the robot's hand and touching nothing else."""
    before, after = start.blocks[block], end.blocks[block]
    risen = _displacement(before, after)[2] > LIFT[place]
    return risen and after.touching == {start.robot} and start.surface(place) in before.contacts


def _placed(place: str, start: JudgeState, end: JudgeState) -> bool:
    """The one block that the robot held lies at `place`, and the robot does not touch it."""
    held = {body for body, _ in start.robot_contacts}
    names = [name for name, block in start.blocks.items() if held == {block.body}]
    if not names or held & {body for body, _ in end.robot_contacts}:
        return False
    in_hand_only = start.blocks[names[0]].touching == {start.robot}
    return in_hand_only and end.surface(place) in end.blocks[names[0]].contacts


def _pushed_into_drawer(start: JudgeState, end: JudgeState) -> bool:
    """A block that lay on nothing but the table touches the drawer."""
    return any(
        before.contacts == {start.surface("table")} and end.surface("drawer") in end.blocks[name].contacts
        for name, before in start.blocks.items()
    )


def _switched(light: str, to: int, start: JudgeState, end: JudgeState) -> bool:
    return start.lights[light] == 1 - to and end.lights[light] == to


def _stacked(start: JudgeState, end: JudgeState) -> bool:
    """A block that touched no block touches nothing but blocks, and is slow."""
    bodies = {block.body for block in start.blocks.values()}
    return any(
        not before.touching & bodies and _on_blocks_only(end.blocks[name], bodies)
        for name, before in start.blocks.items()
    )


def _unstacked(start: JudgeState, end: JudgeState) -> bool:
    """The reverse of `_stacked`: it was slow before."""
    bodies = {block.body for block in start.blocks.values()}
    return any(
        _on_blocks_only(before, bodies) and not end.blocks[name].touching & bodies
        for name, before in start.blocks.items()
    )


def _on_blocks_only(block: BlockState, bodies: set[int]) -> bool:
    return bool(block.touching) and block.touching <= bodies and block.slow


BOTH_WAYS = [(color, side, sign) for color in COLORS for side, sign in (("right", 1), ("left", -1))]
RULES: dict[str, Rule] = {
    **{f"rotate_{c}_block_{side}": partial(_rotated, f"block_{c}", -sign) for c, side, sign in BOTH_WAYS},
    **{f"push_{c}_block_{side}": partial(_pushed, f"block_{c}", sign) for c, side, sign in BOTH_WAYS},
    **{f"lift_{c}_block_{place}": partial(_lifted, f"block_{c}", place) for c in COLORS for place in LIFT},
    "move_slider_left": partial(_moved_door, "base__slide", SLIDE),
    "move_slider_right": partial(_moved_door, "base__slide", -SLIDE),
    "open_drawer": partial(_moved_door, "base__drawer", DRAWER),
    "close_drawer": partial(_moved_door, "base__drawer", -DRAWER),
    "place_in_slider": partial(_placed, "slider"),
    "place_in_drawer": partial(_placed, "drawer"),
    "stack_block": _stacked,
    "unstack_block": _unstacked,
    "turn_on_lightbulb": partial(_switched, "lightbulb", 1),
    "turn_off_lightbulb": partial(_switched, "lightbulb", 0),
    "turn_on_led": partial(_switched, "led", 1),
    "turn_off_led": partial(_switched, "led", 0),
    "push_into_drawer": _pushed_into_drawer,
}


def solved(task: str, start: JudgeState, end: JudgeState) -> bool:
    """Whether `task` was done between `start` and `end`."""
    return RULES[check_task(task)](start, end)


def solved_tasks(start: JudgeState, end: JudgeState, tasks: Iterable[str] = TASKS) -> set[str]:
    """Those of `tasks` that were done between `start` and `end`."""
    return {task for task in tasks if solved(task, start, end)}
