"""Starts of SIMPLER's tasks at random, for demonstrations: near the official ones, and a little beyond."""

from dataclasses import replace
from itertools import combinations
from math import dist

import numpy as np

from defi.benchmarks.simpler.episodes import Episode, Place, episodes, yaw
from defi.benchmarks.simpler.poses import multiplied

BEYOND = 0.015  # m, of the official places
TURNED = 0.15  # rad, from an official turn
BASE = (0.03, 0.015, 0.02)  # m and rad, from an official place of the robot before the cabinet
APART = {  # m between two objects' middles, for both and for a hand around one of them
    "widowx_carrot_on_plate": 0.13,
    "widowx_spoon_on_towel": 0.13,
    "widowx_stack_cube": 0.08,
    "google_robot_move_near_v0": 0.2,
    "google_robot_move_near_v1": 0.2,
}


def random_start(task: str, random: np.random.Generator, index: int = -1) -> Episode:
    """A start of a task of `TASKS`: an official one, drawn with equal chance, changed a little.

    Objects stand anywhere in the rectangle that the official places span, turned from one of the official
    turns by up to `TURNED`; what has one official place (the basket, by which is judged) stays as it is.
    Before the cabinet the robot stands near one of its nine places, and the photo is that place's. index:
    what the episode says of itself.
    """
    official = episodes(task)
    start = official[random.integers(len(official))]
    if not start.objects:
        base = np.add(start.base, random.uniform(-1, 1, 3) * BASE)
        return replace(start, index=index, setting="", base=tuple(base.tolist()))
    spots = [np.array([each.objects[place].xy for each in official]) for place in range(len(start.objects))]
    apart = APART.get(task, 0.0)
    while True:
        places = [_within(each, random) for each in spots]
        if all(dist(one, other) >= apart for one, other in combinations(places, 2)):
            break
    objects = tuple(
        replace(placed, xy=place, turn=_turned(placed.turn, random)) if np.ptp(each, 0).any() else placed
        for placed, place, each in zip(start.objects, places, spots)
    )
    return replace(start, index=index, setting="", objects=objects)


def _within(spots: np.ndarray, random: np.random.Generator) -> Place:
    """In the rectangle around the spots [n, 2] and a little beyond; the only spot there is stays."""
    low, high = spots.min(0), spots.max(0)
    margin = BEYOND * (high > low).any()
    x, y = random.uniform(low - margin, high + margin).tolist()
    return x, y


def _turned(turn: tuple[float, ...], random: np.random.Generator):
    w, x, y, z = multiplied(yaw(random.uniform(-TURNED, TURNED)), turn).tolist()
    return w, x, y, z
