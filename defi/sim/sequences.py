"""Chains of tasks for evaluation, and the states they start from: CALVIN's protocol, or a subset's."""

import functools
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from defi.errors import UserError
from defi.sim.tasks import BLOCKS, TASK_TABLE, TASKS, Situation, check_tasks

CHAIN_LENGTH = 5
MOST_SEQUENCES = 100_000  # some minutes to draw; weeks to roll out
LONGEST_PATH = 3  # tasks, of `shortest_path`
DRAWS = 4096  # shuffles made at a time: about one in 4000 is a feasible chain

DOORS = ({"move_slider_left", "move_slider_right"}, {"open_drawer", "close_drawer"})  # undo each other
ROBOT_START = (
    0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
    -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0,
)  # fmt: skip
TABLE_PLACES = (0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.119995140, 0.459990010)
SLIDER_PLACES = {
    "slider_left": (-0.240851662, 0.0924044687, 0.460990009),
    "slider_right": (0.0703416330, 0.0924044687, 0.460990009),
}
SLIDER_LEFT, DRAWER_OPEN, SWITCH_ON = 0.28, 0.22, 0.088
YAW_RANGE = (np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)


@dataclass(frozen=True)
class Chain:
    """Tasks to solve one after the other, from `initial_state`."""

    initial_state: Situation
    tasks: tuple[str, ...]


def initial_states() -> list[Situation]:
    """All situations a chain can start from: one or two blocks on the table, at most one behind each side."""
    places = [
        blocks
        for blocks in itertools.product(("table", "slider_right", "slider_left"), repeat=len(BLOCKS))
        if blocks.count("table") in (1, 2) and max(map(blocks.count, SLIDER_PLACES)) < 2
    ]
    keys = ("led", "lightbulb", "slider", "drawer", *BLOCKS, "grasped")
    choices = itertools.product((0, 1), (0, 1), ("right", "left"), ("closed", "open"), places)
    return [dict(zip(keys, (*fixtures, *blocks, 0))) for *fixtures, blocks in choices]


def sequences(n: int) -> list[Chain]:
    """The protocol's n chains of five tasks from five categories: the same n gives the same chains."""
    if not 1 <= n <= MOST_SEQUENCES:
        raise UserError(f"{n} sequences: ask for 1 to {MOST_SEQUENCES}; the official number is 1000")
    states = initial_states()
    shares = np.array_split(np.arange(n), len(states))
    result = []
    for seed, (state, share) in enumerate(zip(states, shares)):
        result += [Chain(state, tasks) for tasks in _feasible_draws(state, len(share), seed)]
    np.random.RandomState(0).shuffle(result)
    return result


@functools.cache
def _transitions() -> tuple[dict[tuple[int | str, ...], int], Int[np.ndarray, "S N"]]:
    """Every situation that tasks can lead to, numbered, and where each task leads (−1: it does not apply)."""
    known = initial_states()
    number = {tuple(state.values()): i for i, state in enumerate(known)}
    leads_to = []
    for state in known:  # grows while it is read
        leads_to.append([-1] * len(TASKS))
        for i, task in enumerate(TASK_TABLE.values()):
            if (after := task.outcome(state)) is not None:
                leads_to[-1][i] = number.setdefault(tuple(after.values()), len(known))
                if leads_to[-1][i] == len(known):
                    known.append(after)
    return number, np.array(leads_to)


def _feasible_draws(state: Situation, count: int, seed: int) -> list[tuple[str, ...]]:
    """The first `count` chains that are feasible from `state`, out of the draws of generator `seed`."""
    number, leads_to = _transitions()
    category_bit = np.array([1 << task.category for task in TASK_TABLE.values()])
    rng = np.random.RandomState(seed)
    found: list[tuple[str, ...]] = []
    while len(found) < count:
        drawn = _draw_chains(rng)
        situation = np.full(DRAWS, number[tuple(state.values())])
        feasible, used = np.ones(DRAWS, dtype=bool), np.zeros(DRAWS, dtype=np.int64)
        for task in drawn.T:
            situation = leads_to[situation, task]  # after a −1 it no longer matters
            feasible &= (situation >= 0) & (used & category_bit[task] == 0)
            used |= category_bit[task]
        found += [tuple(TASKS[task] for task in chain) for chain in drawn[feasible]]
    return found[:count]


def _draw_chains(rng: np.random.RandomState) -> UInt8[np.ndarray, "N L"]:
    """The results of N calls of `rng.choice(len(TASKS), CHAIN_LENGTH, replace=False)`, at once.

    NumPy shuffles from the back: for i = len(TASKS) − 1 … 1, item i changes places with one of 0 … i; then it
    takes what comes first.
    """
    last = np.arange(len(TASKS) - 1, 0, -1)
    swaps = rng.randint(0, last + 1, size=(DRAWS, len(last)))
    order = np.repeat(np.arange(len(TASKS), dtype=np.uint8)[:, None], DRAWS, axis=1)
    draws = np.arange(DRAWS)
    for i, j in zip(last, swaps.T):
        moved = order[i].copy()
        order[i] = order[j, draws]
        order[j, draws] = moved
    return order[:CHAIN_LENGTH].T


def shortest_path(
    situation: Situation, goal: str, available: Sequence[str] = TASKS
) -> tuple[str, ...] | None:
    """The fewest tasks, `goal` the last, that lead to it; None if that takes more than `LONGEST_PATH`."""
    queue: deque[tuple[Situation, tuple[str, ...]]] = deque([(situation, ())])
    while queue:
        now, path = queue.popleft()
        if TASK_TABLE[goal].outcome(now) is not None:
            return (*path, goal)
        if len(path) + 1 < LONGEST_PATH:
            after = ((TASK_TABLE[task].outcome(now), task) for task in available)
            queue.extend((then, (*path, task)) for then, task in after if then is not None)
    return None


def chains(tasks: Sequence[str], n: int, length: int = CHAIN_LENGTH, seed: int = 0) -> list[Chain]:
    """n feasible chains of `length` different tasks out of `tasks`, seeded. Categories may repeat, but each
    door is moved once: success comes just past the threshold, which can leave too short a way back.

    Initial states are drawn evenly from those of the protocol that allow such a chain.
    """
    tasks = check_tasks(tasks)
    rng = np.random.default_rng(seed)

    def starts(length: int) -> list[Situation]:
        return [state for state in initial_states() if _random_chain(state, tasks, length, rng) is not None]

    states = starts(length)
    if not states:
        longest = next(shorter for shorter in range(length - 1, -1, -1) if starts(shorter))
        fix = f"name more, or set length={longest}" if longest else "name more"
        raise UserError(f"{', '.join(tasks)}: no chain of {length} can be made of these tasks; {fix}")
    drawn = (states[i] for i in rng.integers(len(states), size=n))
    return [Chain(state, _random_chain(state, tasks, length, rng)) for state in drawn]


def _random_chain(
    state: Situation, tasks: Sequence[str], length: int, rng: np.random.Generator
) -> tuple[str, ...] | None:
    """A feasible chain in random order, or None: depth first, stepping back from dead ends."""
    if length == 0:
        return ()
    for i in rng.permutation(len(tasks)):
        after = TASK_TABLE[tasks[i]].outcome(state)
        if after is not None:
            left = [t for t in tasks if t != tasks[i] and {t, tasks[i]} not in DOORS]
            rest = _random_chain(after, left, length - 1, rng)
            if rest is not None:
                return (tasks[i], *rest)
    return None


def fnv1(data: bytes) -> int:
    """FNV-1 hash, 32 bit, with offset basis 0."""
    value = 0
    for byte in data:
        value = (value * 0x01000193 & 0xFFFFFFFF) ^ byte
    return value


def start_state(state: Situation) -> tuple[Float[np.ndarray, "15"], Float[np.ndarray, "24"]]:
    """robot_obs and scene_obs of an initial state, in scene D's order of blocks (red, blue, pink).

    The blocks' places on the table and their yaw are drawn with a seed made from the state.
    """
    rng = np.random.RandomState(fnv1(str(state.values()).encode("utf-16-le")))
    free = list(TABLE_PLACES)
    rng.shuffle(free)
    red_on_table = state["red_block"] == "table"
    on_table = {"red_block": free[0], "blue_block": free[1 if red_on_table else 0], "pink_block": free[1]}
    poses: list[float] = []
    for block, place in on_table.items():
        position = SLIDER_PLACES.get(state[block], place)
        poses += [*position, 0, 0, rng.uniform(*YAW_RANGE)]
    slide = SLIDER_LEFT * (state["slider"] == "left")
    drawer, switch = DRAWER_OPEN * (state["drawer"] == "open"), SWITCH_ON * state["lightbulb"]
    table = [slide, drawer, 0, switch, state["lightbulb"], state["led"]]
    return np.array(ROBOT_START), np.array([*table, *poses], dtype=np.float64)
