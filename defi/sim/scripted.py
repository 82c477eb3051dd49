"""Scripted policies (oracles) for all 34 tasks: `ScriptedPolicy(task, world).act(world)` is the next action.

They steer by the state of the world alone, with the hand pointing down, and leave with a short retreat, so
that the next task starts from a sane pose. How often they succeed: `python -m defi.sim.collect record=false`.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float

from defi.errors import UserError
from defi.sim.motion import OPEN, OVER_DOOR, RISE, TIP, Block, Move, Point, Skill, View, action, descend, wrap
from defi.sim.panda import FINGER_WIDTH
from defi.sim.scene import BLOCKS, Vector
from defi.sim.scenes import BLOCK_WIDTH, HANDLE_GAP, HANDLE_TOP, LEVER, TOP
from defi.sim.tasks import check_task
from defi.sim.world import World

RETREAT_STEPS = 12
HOOK = HANDLE_TOP - 0.042 + TIP  # height of the TCP with the fingers behind the handle
BESIDE_KNOB, AROUND_KNOB = 0.105, -0.17  # how far beside the knob the hand is; y where it goes around it
CLOSED_FINGERS = 0.02  # metres from the TCP to the outside of closed fingers
OPEN_FINGERS = 0.065  # … of open ones, with some margin
BEFORE_KNOB = -0.058  # y up to which the hand can come down over the table
OVER_TABLE = 0.535  # height of the TCP that clears blocks on the table
OVER_BLOCKS = 0.55  # height of a carried block's middle that clears others
OVER_DRAWER = HANDLE_TOP + 0.05
PUSHED, TURNED = 0.104, np.radians(68)  # just past what the judge asks for
# Where to put a block in each half of the shelf: its middle; if a block is there, nearer to the other half.
SHELF_PLACES = {"left": ((-0.24, 0.092), (-0.13, 0.092)), "right": ((0.07, 0.092), (-0.04, 0.092))}

# Drawer, slide, switch and button: the closed fingers hook, push and press.


def work_drawer(view: View, pull: float) -> Move:
    """Hook the fingers between the drawer's front and its handle; pull, or push the front."""
    gap = view.grips["base__drawer"]
    offset = view.tcp - gap
    if abs(offset[1]) < HANDLE_GAP / 2 and abs(offset[0]) < 0.07 and view.tcp[2] < HANDLE_TOP + 0.005:
        return Move(np.array([view.tcp[0], view.tcp[1] + pull, HOOK]))
    return Move(descend(view.tcp, np.array([*gap[:2], HOOK]), clear=HANDLE_TOP + 0.05))


def work_slide(view: View, side: int) -> Move:
    """Go beside the knob, from the front, and push it along (`side` +1: to the left)."""
    x, y, z = view.grips["base__slide"]
    place = side * (view.tcp[0] - x)  # how far on the pushing side of the knob
    before = np.array([x + side * BESIDE_KNOB, AROUND_KNOB, z])
    if view.tcp[1] > y + 0.035 or view.tcp[2] < z - 0.05:
        return Move(descend(view.tcp, before, clear=z))
    if view.tcp[1] > y - 0.035 and place > 0.035:
        return Move(np.array([view.tcp[0] - side * 0.1, y, z]))
    if place > 0.065 and abs(place - BESIDE_KNOB) < 0.05:
        return Move(np.array([x + side * BESIDE_KNOB, y, z]))
    if view.tcp[1] > y - 0.075:
        before[0] = view.tcp[0]  # back off before going around
    return Move(before)


def lift_switch(view: View) -> Move:
    """From the front, push the lever back and climb with it."""
    x, y, z = view.grips["base__switch"]
    offset = view.tcp - (x, y, z)
    low = z + 0.01 + TIP
    if -0.1 < offset[1] < 0.01 and abs(offset[0]) < 0.05 and offset[2] < LEVER[2]:
        climb = 0.02 if view.joints["base__switch"] > 0.003 else 0
        return Move(np.array([x, view.tcp[1] + 0.05, low + climb]))
    return Move(descend(view.tcp, np.array([x, y - 0.05, low]), clear=z + LEVER[2] + TIP + 0.03))


def lower_switch(view: View) -> Move:
    """From above, press the lever down along its way."""
    x, y, z = view.grips["base__switch"]
    top = z + LEVER[2] + TIP
    over = np.array([x, y + LEVER[1] / 2, top - 0.06])
    return Move(descend(view.tcp, over, clear=top + 0.03, near=0.035))


def press_button(view: View) -> Move:
    """From above; again, if the light has the wrong state."""
    x, y, z = view.grips["base__button"]
    if view.joints["base__button"] > 0.014:
        return Move(view.tcp + (0, 0, 0.05))
    return Move(descend(view.tcp, np.array([x, y, z - 0.04]), clear=z + TIP + 0.03))


def within(joint: str, low: float, high: float) -> Callable[[View], bool]:
    return lambda view: low < view.joints[joint] < high


FIXTURE_SKILLS = {
    "open_drawer": Skill(partial(work_drawer, pull=-0.1), within("base__drawer", 0.21, 1), (0, 0, 0.14)),
    "close_drawer": Skill(partial(work_drawer, pull=0.1), within("base__drawer", -1, 0.006), (0, 0, 0.14)),
    "move_slider_left": Skill(partial(work_slide, side=1), within("base__slide", 0.272, 1), (0, -0.13, 0)),
    "move_slider_right": Skill(partial(work_slide, side=-1), within("base__slide", -1, 0.006), (0, -0.13, 0)),
    "turn_on_lightbulb": Skill(lift_switch, within("base__switch", 0.075, 1), (0, -0.12, 0.04)),
    "turn_off_lightbulb": Skill(lower_switch, within("base__switch", -1, 0.012), (0, 0, 0.13)),
    "turn_on_led": Skill(press_button, lambda view: view.led == 1, (0, 0, 0.12)),
    "turn_off_led": Skill(press_button, lambda view: view.led == 0, (0, 0, 0.12)),
}

# Blocks. Skills are made for the situation at their start: which block is held, how a block lay.


def nearest_block(view: View) -> str:
    return min(view.blocks, key=lambda name: np.linalg.norm(view.blocks[name].place - view.tcp))


def neighbours(view: View, name: str) -> list[Block]:
    """Other blocks that lie at the height of this one."""
    height = view.blocks[name].place[2]
    others = (block for other, block in view.blocks.items() if other != name)
    return [block for block in others if abs(block.place[2] - height) < BLOCK_WIDTH]


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
    """The hand's yaw that puts the fingers on the block's long sides, nearest to π/2: fingers apart along x.

    A cube may be taken the other way, if another block is in the way of the first.
    """
    block = view.blocks[name]
    both_ways = np.array([block.yaw, block.yaw + np.pi / 2])
    first, second = (np.pi / 2 + wrap(2 * (both_ways - np.pi / 2)) / 2).tolist()
    if block.length > BLOCK_WIDTH:
        return first
    near, far = sorted((first, second), key=lambda yaw: abs(yaw - np.pi / 2))
    return far if crowded(view, name, near) and not crowded(view, name, far) else near


def grasp(view: View, name: str) -> Move:
    """Over the block with open fingers, down, close; push it out of a crowd first."""
    place = view.blocks[name].place
    yaw = grip_yaw(view, name)
    turned = abs(float(wrap(view.euler[2] - yaw)))
    aligned = np.linalg.norm((place - view.tcp)[:2]) < 0.012 and abs(place[2] - view.tcp[2]) < 0.012
    if view.holds(name) or aligned:
        return Move(view.tcp, yaw=yaw)
    if place[1] < 0 and place[2] < TOP + 0.03 and crowded(view, name, yaw):
        return push(view, name, np.array([0.0, 1.0]))
    clear = OVER_DOOR if place[1] > 0 else OVER_TABLE if place[2] > TOP else OVER_DRAWER
    goal = np.array([*place[:2], place[2] + 0.002])
    if turned > 0.25 and view.tcp[2] > place[2] + 0.05:
        goal[2] = clear
    return Move(descend(view.tcp, goal, clear, near=0.02), gripper=OPEN, yaw=yaw, turn=True)


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
    """Put a block in the hand that the task does not ask for on the table, open, rise."""
    place = view.blocks[name].place
    if view.is_open:
        return Move(view.tcp + RISE, gripper=OPEN)
    if place[2] < TOP + 0.03:
        return Move(view.tcp, gripper=OPEN, yaw=view.yaw)
    return Move(view.tcp + descend(place, free_spot(view, name), clear=OVER_BLOCKS, near=0.015) - place)


def free_spot(view: View, name: str) -> Point:
    """Where to put a block on the table: far from the others there, just above it."""
    others = [block.place for other, block in view.blocks.items() if other != name]
    taken = [x for x, y, z in others if y < 0 and z < TOP + 0.03]
    spot = max((0.05, 0.14, 0.23), key=lambda x: min((abs(x - other) for other in taken), default=0))
    return np.array([spot, -0.11, TOP + 0.025])


def push_aside(start: View, name: str, side: int) -> Skill:
    """Beside the block with closed fingers, then along x (`side` +1: to the right)."""
    x = start.blocks[name].place[0]
    return Skill(
        lambda view: push(view, name, np.array([float(side), 0.0])),
        lambda view: side * (view.blocks[name].place[0] - x) > PUSHED,
        leave=(-0.04 * side, 0.0, 0.1),
    )


def lift(start: View, name: str, rise: float) -> Skill:
    """Grasp the block and raise it."""
    height = start.blocks[name].place[2] + rise
    return Skill(
        lambda view: Move(view.tcp + RISE, yaw=view.yaw) if view.holds(name) else grasp(view, name),
        lambda view: view.holds(name) and view.blocks[name].place[2] > height,
        leave=(0, 0, 0.05),
        block=name,
    )


def rotate(start: View, name: str, side: int) -> Skill:
    """Grasp the block, turn it with the hand where it lies (`side` +1: counterclockwise), let go."""
    yaw = start.blocks[name].yaw
    y = start.blocks[name].place[1] - 0.025  # drawn there meanwhile, for the hand to clear the door's knob

    def turned(view: View) -> bool:
        return side * float(wrap(view.blocks[name].yaw - yaw)) > TURNED

    def move(view: View) -> Move:
        if turned(view):
            return Move(view.tcp, gripper=OPEN, yaw=view.yaw)
        if view.holds(name):
            goal = np.array([view.tcp[0], min(view.tcp[1], y), TOP + 0.022])
            return Move(goal, yaw=view.yaw + side * 0.15, turn=True)
        return grasp(view, name)

    return Skill(move, lambda view: turned(view) and view.is_open, leave_gripper=OPEN, block=name)


def place(name: str, where: Callable[[View], Point], clear: float, leave: Vector = RISE) -> Skill:
    """Carry the held block at the height `clear`, lower it, open the fingers with its middle at `where`."""

    def done(view: View) -> bool:
        offset = view.blocks[name].place - where(view)
        return view.is_open and np.hypot(*offset[:2]) < 0.06 and offset[2] < 0.02

    def move(view: View) -> Move:
        block, goal = view.blocks[name].place, where(view)
        if np.hypot(*(block - goal)[:2]) < 0.02 and abs(block[2] - goal[2]) < 0.012:
            return Move(view.tcp, gripper=OPEN, yaw=view.yaw)
        if not view.holds(name):
            return grasp(view, name)
        return Move(view.tcp + descend(block, goal, clear, near=0.015, travel=clear) - block)

    return Skill(move, done, leave, leave_gripper=OPEN, block=name)


def place_in_drawer(start: View) -> Skill:
    def middle(view: View) -> Point:
        return np.array([*(view.grips["base__drawer"][:2] + (0, 0.155)), 0.36])

    return place(nearest_block(start), middle, clear=0.5)


def place_on_shelf(start: View) -> Skill:
    """At a free place in the half of the shelf that the door leaves open."""
    places = SHELF_PLACES["right" if start.joints["base__slide"] > 0.14 else "left"]
    blocks = [block.place for block in start.blocks.values()]
    taken = [block[:2] for block in blocks if block[1] > 0 and block[2] < TOP + 0.05]
    free = [min((float(np.hypot(*(spot - other))) for other in taken), default=1.0) for spot in places]
    spot = places[0] if free[0] > 0.07 else places[int(np.argmax(free))]
    goal = np.array([*spot, TOP + 0.03])
    return place(nearest_block(start), lambda _: goal, clear=OVER_DOOR + 0.01, leave=(0.0, 0.0, 0.19))


def stack(start: View) -> Skill:
    name = nearest_block(start)
    others = {other: block.place for other, block in start.blocks.items() if other != name}
    on_table = [other for other, (_, y, z) in others.items() if y < 0 and z > TOP]
    below = min(on_table, key=lambda other: np.linalg.norm(others[other] - start.tcp))
    return place(name, lambda view: view.blocks[below].place + (0, 0, 0.043), clear=OVER_BLOCKS)


def unstack(start: View) -> Skill:
    """Put the highest block on the table."""
    name = max(start.blocks, key=lambda name: start.blocks[name].place[2])
    spot = free_spot(start, name)
    return place(name, lambda _: spot, clear=OVER_BLOCKS)


def push_into_drawer(start: View) -> Skill:
    """From behind the block, push it over the table's front edge, after moving it to where the drawer is."""
    middle = start.grips["base__drawer"][0]
    on_table = [name for name, block in start.blocks.items() if block.place[2] > TOP and block.place[1] < 0]
    name = min(on_table or BLOCKS, key=lambda name: abs(start.blocks[name].place[0] - middle))

    def move(view: View) -> Move:
        x, drawer = view.blocks[name].place[0], view.grips["base__drawer"][0]
        beside = np.clip(x - drawer, -0.05, 0.05) + drawer - x
        return push(view, name, np.array([np.sign(beside), 0.0] if abs(beside) > 0.005 else [0.0, -1.0]))

    return Skill(move, lambda view: view.blocks[name].place[2] < TOP - 0.04)


BLOCK_SKILLS: dict[str, Callable[[View], Skill]] = {
    "place_in_drawer": place_in_drawer,
    "place_in_slider": place_on_shelf,
    "stack_block": stack,
    "unstack_block": unstack,
    "push_into_drawer": push_into_drawer,
}
for name in BLOCKS:
    color = name.removeprefix("block_")
    for side, sign in (("right", 1), ("left", -1)):
        BLOCK_SKILLS[f"push_{color}_block_{side}"] = partial(push_aside, name=name, side=sign)
        BLOCK_SKILLS[f"rotate_{color}_block_{side}"] = partial(rotate, name=name, side=-sign)
    for shelf, rise in (("table", 0.06), ("slider", 0.04), ("drawer", 0.07)):
        BLOCK_SKILLS[f"lift_{color}_block_{shelf}"] = partial(lift, name=name, rise=rise)


class ScriptedPolicy:
    """Solves one task, once. Made when the task is given: it may depend on the state at its start."""

    def __init__(self, task: str, world: World) -> None:
        check_task(task)
        if not world.scene.table.grips:
            known = "scripted policies know the built-in tables only; use sim=builtin"
            raise UserError(f"scene {world.scene.name}: {known}")
        self.skill = FIXTURE_SKILLS.get(task) or BLOCK_SKILLS[task](View(world))
        self._home: Point | None = None  # where the hand goes when the task is done

    def act(self, world: World) -> Float[np.ndarray, "7"] | None:
        """The next action, or None when the task is done and the hand is out of the way."""
        view = View(world)
        if not self.skill.done(view):
            self._home = None
            in_hand = next((name for name in view.blocks if view.between(name)), self.skill.block)
            move = self.skill.move(view) if in_hand == self.skill.block else let_go(view, in_hand)
        else:
            if self._home is None:
                self._home, self._yaw, self._retreat = view.tcp + self.skill.leave, view.yaw, RETREAT_STEPS
            self._retreat -= 1
            if self._retreat < 0 or np.linalg.norm(self._home - view.tcp) < 0.02:
                return None
            move = Move(self._home, gripper=self.skill.leave_gripper, yaw=self._yaw)
        return action(move, view, world.arm.target_position)
