"""The 34 tasks: names, what must hold before and what holds after, and how to ask for each in words.

The judge (`defi.sim.judge`) says whether a task was solved; this module says when it can be asked for.
A *situation* is a dict: led and lightbulb (0, 1), slider (right, left), drawer (closed, open), red_block,
blue_block and pink_block (table, slider_right, slider_left, drawer, grasped, stacked_top, stacked_bottom),
grasped (0, 1).
"""

import difflib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from defi.errors import UserError

Situation = dict[str, int | str]
COLORS = ("red", "blue", "pink")
BLOCKS = tuple(f"{color}_block" for color in COLORS)
SIDES = ("right", "left")


@dataclass(frozen=True)
class Task:
    """A task's evaluation category (a chain of the protocol has no category twice) and the ways to do it.

    Of each way: values that the situation must have (any of the given), and those it has after.
    """

    category: int
    alternatives: tuple[tuple[dict[str, tuple[int | str, ...]], Situation], ...]

    def outcome(self, situation: Situation) -> Situation | None:
        """The situation after the task, or None where not exactly one alternative applies."""
        fits = [
            gives
            for needs, gives in self.alternatives
            if all(situation[key] in values for key, values in needs.items())
        ]
        return situation | fits[0] if len(fits) == 1 else None


def _task(category: int, *ways: tuple[dict[str, int | str | tuple[str, ...]], Situation]) -> Task:
    """A task whose alternatives begin with an empty hand, or end with one if they need a grasped block."""
    alternatives = []
    for needs, gives in ways:
        held = "grasped" in needs.values()
        needs, gives = needs | {"grasped": int(held)}, gives | ({"grasped": 0} if held else {})
        alternatives.append(({k: v if isinstance(v, tuple) else (v,) for k, v in needs.items()}, gives))
    return Task(category, tuple(alternatives))


SHELF = ("slider_right", "slider_left")
STACKED = [{top: "stacked_top", low: "stacked_bottom"} for top, low in itertools.permutations(BLOCKS, 2)]
# The protocol draws tasks in this order. Behind the sliding door only the open half can be reached.
TASK_TABLE: dict[str, Task] = {
    **{
        f"{verb}_{block}_{side}": _task(1, ({block: "table"}, {}))
        for verb, block, side in itertools.product(("rotate", "push"), BLOCKS, SIDES)
    },
    "move_slider_left": _task(2, ({"slider": "right"}, {"slider": "left"})),
    "move_slider_right": _task(2, ({"slider": "left"}, {"slider": "right"})),
    "open_drawer": _task(3, ({"drawer": "closed"}, {"drawer": "open"})),
    "close_drawer": _task(3, ({"drawer": "open"}, {"drawer": "closed"})),
    **{
        f"lift_{block}_{place}": _task(
            category, *(({block: at} | door, {block: "grasped", "grasped": 1}) for at, door in ways)
        )
        for block in BLOCKS
        for place, category, ways in (
            ("table", 4, [("table", {})]),
            ("slider", 5, [("slider_left", {"slider": "right"}), ("slider_right", {"slider": "left"})]),
            ("drawer", 6, [("drawer", {"drawer": "open"})]),
        )
    },
    "place_in_slider": _task(
        7, *(({b: "grasped", "slider": side}, {b: f"slider_{side}"}) for b in BLOCKS for side in SIDES)
    ),
    "place_in_drawer": _task(7, *(({b: "grasped", "drawer": "open"}, {b: "drawer"}) for b in BLOCKS)),
    "stack_block": _task(10, *((dict(zip(pair, ("grasped", "table"))), pair) for pair in STACKED)),
    "unstack_block": _task(11, *((pair, dict.fromkeys(pair, "table")) for pair in STACKED)),
    "turn_on_lightbulb": _task(8, ({"lightbulb": 0}, {"lightbulb": 1})),
    "turn_off_lightbulb": _task(8, ({"lightbulb": 1}, {"lightbulb": 0})),
    "turn_on_led": _task(8, ({"led": 0}, {"led": 1})),
    "turn_off_led": _task(8, ({"led": 1}, {"led": 0})),
    "push_into_drawer": _task(  # the other two out of the way behind the slide
        9, *((dict.fromkeys(BLOCKS, SHELF) | {b: "table", "drawer": "open"}, {b: "drawer"}) for b in BLOCKS)
    ),
}
TASKS: tuple[str, ...] = tuple(TASK_TABLE)


def check_task(name: str) -> str:
    """`name`, if there is such a task; otherwise a UserError that names the nearest ones."""
    if name in TASK_TABLE:
        return name
    near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}" if near else f"one of {', '.join(TASKS)}"
    raise UserError(f"{name}: no such task; {hint}")


def check_tasks(names: Iterable[str]) -> tuple[str, ...]:
    """All `names` checked, duplicates refused, order kept."""
    names = tuple(check_task(name) for name in names)
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: a task is named twice; name each once")
    return names


# Several ways to ask for each kind of task. {color}: the block; {side}: left, right; {turn}: seen from above.
_PHRASES: dict[str, tuple[str, ...]] = {
    "rotate": (
        "turn the {color} block to the {side}",
        "rotate the {color} block towards the {side}",
        "spin the {color} block {turn}",
        "grab the {color} block and turn it {side}",
        "give the {color} block a turn to the {side}",
        "twist the {color} block {turn}",
        "make the {color} block face further {side}",
    ),
    "push": (
        "push the {color} block to the {side}",
        "slide the {color} block over to the {side}",
        "shove the {color} block {side}",
        "move the {color} block further to the {side}",
        "nudge the {color} block along to the {side}",
        "the {color} block belongs more to the {side}, push it there",
    ),
    "move_slider": (
        "slide the door to the {side}",
        "move the sliding door {side}",
        "take the door handle and pull it to the {side}",
        "push the slider {side}",
        "shift the cabinet door over to the {side}",
        "the sliding door should be on the {side}",
    ),
    "open_drawer": (
        "open the drawer",
        "pull the drawer out",
        "take the handle and draw the drawer towards you",
        "slide the drawer open",
        "get the drawer to stand open",
        "pull on the handle of the drawer",
    ),
    "close_drawer": (
        "close the drawer",
        "push the drawer in",
        "shut the drawer",
        "slide the drawer back under the table",
        "push against the drawer until it is closed",
        "put the drawer back in its place",
    ),
    "lift_table": (
        "pick up the {color} block from the table",
        "lift the {color} block off the table",
        "grab the {color} block on the table top and raise it",
        "take the {color} block up from the table",
        "get hold of the {color} block lying on the table and lift it",
        "raise the {color} block above the table",
    ),
    "lift_slider": (
        "pick up the {color} block from the cabinet",
        "lift the {color} block off the shelf behind the door",
        "reach into the cabinet and take out the {color} block",
        "grab the {color} block behind the sliding door and raise it",
        "get the {color} block out of the cabinet",
        "take up the {color} block that is on the shelf",
    ),
    "lift_drawer": (
        "pick up the {color} block from the drawer",
        "lift the {color} block out of the drawer",
        "reach into the drawer and grab the {color} block",
        "get the {color} block that lies in the drawer",
        "raise the {color} block from inside the drawer",
        "take out the {color} block that is in the drawer",
    ),
    "place_in_slider": (
        "put the block into the cabinet",
        "place what you hold on the shelf behind the door",
        "lay the block down in the sliding cabinet",
        "set the block on the shelf",
        "drop the held block in the cabinet",
        "leave the block behind the sliding door",
    ),
    "place_in_drawer": (
        "put the block into the drawer",
        "place what you hold in the drawer",
        "lay the block down inside the drawer",
        "drop the held block into the open drawer",
        "let the block go over the drawer",
        "leave the block in the drawer",
    ),
    "stack_block": (
        "put the block on top of another block",
        "stack what you hold on another block",
        "set the held block down on a second one",
        "build a tower of two blocks",
        "place one block upon the other",
        "lay the block in your hand on top of another one",
    ),
    "unstack_block": (
        "take the upper block off the lower one",
        "take the tower of blocks apart",
        "bring the top block down to the table",
        "get the block off the top of the other",
        "undo the stack of blocks",
        "lift the block from the pile and set it aside",
    ),
    "turn_on_lightbulb": (
        "switch the light bulb on",
        "move the switch up so that the bulb lights",
        "make the yellow lamp shine",
        "flip the switch to light the bulb",
        "turn the yellow light on",
        "use the lever to get light from the bulb",
    ),
    "turn_off_lightbulb": (
        "switch the light bulb off",
        "move the switch down so that the bulb goes dark",
        "put out the yellow lamp",
        "flip the switch to darken the bulb",
        "turn the yellow light off",
        "use the lever to put the bulb out",
    ),
    "turn_on_led": (
        "press the button so that the green light comes on",
        "turn the led on",
        "push the button to light the led",
        "switch on the green light",
        "make the led shine with the button",
        "hit the button until the green light is on",
    ),
    "turn_off_led": (
        "press the button so that the green light goes out",
        "turn the led off",
        "push the button to darken the led",
        "switch off the green light",
        "make the led go dark with the button",
        "hit the button until the green light is off",
    ),
    "push_into_drawer": (
        "push a block over the edge into the drawer",
        "shove the block until it drops in the drawer",
        "move the block on the table so that it falls into the drawer",
        "sweep the block off the table into the open drawer",
        "let the block tumble into the drawer by pushing it",
        "nudge the block down into the drawer",
    ),
}


def _instructions(task: str) -> tuple[str, ...]:
    """The phrases of a task, with its block's colour and its side filled in."""
    if task in _PHRASES:
        return _PHRASES[task]
    words = task.split("_")
    kind = "move_slider" if words[1] == "slider" else f"lift_{words[3]}" if words[0] == "lift" else words[0]
    turn = {"left": "counterclockwise", "right": "clockwise"}.get(words[-1], "")
    return tuple(phrase.format(color=words[1], side=words[-1], turn=turn) for phrase in _PHRASES[kind])


INSTRUCTIONS: dict[str, tuple[str, ...]] = {task: _instructions(task) for task in TASKS}
