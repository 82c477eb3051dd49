"""The 34 tasks: names, what must hold before and what holds after, and how to ask for each in words.

The judge (`defi.sim.judge`) says whether a task was solved; this module says when it makes sense to ask for it.
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


@dataclass(frozen=True)
class Alternative:
    """One way to ask for a task: values the situation must have (any of the given), and those it has after."""

    needs: dict[str, tuple[int | str, ...]]
    gives: dict[str, int | str]

    def applies(self, situation: Situation) -> bool:
        return all(situation[key] in values for key, values in self.needs.items())


@dataclass(frozen=True)
class Task:
    """A task's evaluation category (a chain of the protocol has no category twice) and its alternatives."""

    category: int
    alternatives: tuple[Alternative, ...]

    def outcome(self, situation: Situation) -> Situation | None:
        """The situation after the task, or None where not exactly one alternative applies."""
        fits = [way for way in self.alternatives if way.applies(situation)]
        return situation | fits[0].gives if len(fits) == 1 else None


def _way(needs: dict[str, int | str | tuple[str, ...]], gives: dict[str, int | str]) -> Alternative:
    return Alternative({k: v if isinstance(v, tuple) else (v,) for k, v in needs.items()}, gives)


def _free(needs: dict[str, int | str | tuple[str, ...]], gives: dict[str, int | str]) -> Alternative:
    """An alternative that asks for an empty hand."""
    return _way(needs | {"grasped": 0}, gives)


def _held(block: str, needs: dict[str, int | str], gives: dict[str, int | str]) -> Alternative:
    """An alternative that asks for `block` in the hand, and empties the hand."""
    return _way({block: "grasped", "grasped": 1} | needs, gives | {"grasped": 0})


def _block_tasks() -> dict[str, Task]:
    """Rotations and pushes on the table: the block stays there."""
    return {
        f"{verb}_{color}_block_{side}": Task(1, (_free({f"{color}_block": "table"}, {}),))
        for verb in ("rotate", "push")
        for color in COLORS
        for side in ("right", "left")
    }


def _toggle(category: int, key: str, before: int | str, after: int | str) -> Task:
    return Task(category, (_free({key: before}, {key: after}),))


def _lift_tasks() -> dict[str, Task]:
    tasks = {}
    for block in (f"{color}_block" for color in COLORS):
        held = {block: "grasped", "grasped": 1}
        tasks[f"lift_{block}_table"] = Task(4, (_free({block: "table"}, held),))
        # Behind the sliding door only the open half can be reached.
        behind = (("slider_left", "right"), ("slider_right", "left"))
        tasks[f"lift_{block}_slider"] = Task(
            5, tuple(_free({block: place, "slider": door}, held) for place, door in behind)
        )
        tasks[f"lift_{block}_drawer"] = Task(6, (_free({block: "drawer", "drawer": "open"}, held),))
    return tasks


def _place_tasks() -> dict[str, Task]:
    blocks = [f"{color}_block" for color in COLORS]
    slider = (
        _held(block, {"slider": door}, {block: f"slider_{door}"})
        for block in blocks
        for door in ("right", "left")
    )
    drawer = (_held(block, {"drawer": "open"}, {block: "drawer"}) for block in blocks)
    return {"place_in_slider": Task(7, tuple(slider)), "place_in_drawer": Task(7, tuple(drawer))}


def _drawer_push() -> Task:
    """One block on the table, the other two out of the way behind the slide."""
    away = ("slider_right", "slider_left")
    blocks = [f"{color}_block" for color in COLORS]
    return Task(
        9,
        tuple(
            _free(
                {other: "table" if other == block else away for other in blocks} | {"drawer": "open"},
                {block: "drawer"},
            )
            for block in blocks
        ),
    )


def _stack_tasks() -> dict[str, Task]:
    pairs = list(itertools.permutations([f"{color}_block" for color in COLORS], 2))
    stacked = [{top: "stacked_top", bottom: "stacked_bottom"} for top, bottom in pairs]
    stack = (_held(top, {bottom: "table"}, after) for (top, bottom), after in zip(pairs, stacked))
    unstack = (_free(before, dict.fromkeys(before, "table")) for before in stacked)
    return {"stack_block": Task(10, tuple(stack)), "unstack_block": Task(11, tuple(unstack))}


# The protocol draws tasks in this order.
TASK_TABLE: dict[str, Task] = {
    **_block_tasks(),
    "move_slider_left": _toggle(2, "slider", "right", "left"),
    "move_slider_right": _toggle(2, "slider", "left", "right"),
    "open_drawer": _toggle(3, "drawer", "closed", "open"),
    "close_drawer": _toggle(3, "drawer", "open", "closed"),
    **_lift_tasks(),
    **_place_tasks(),
    **_stack_tasks(),
    "turn_on_lightbulb": _toggle(8, "lightbulb", 0, 1),
    "turn_off_lightbulb": _toggle(8, "lightbulb", 1, 0),
    "turn_on_led": _toggle(8, "led", 0, 1),
    "turn_off_led": _toggle(8, "led", 1, 0),
    "push_into_drawer": _drawer_push(),
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
