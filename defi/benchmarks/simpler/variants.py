"""Variant aggregation: the Google robot's episodes before other tables, in other rooms and light. No photos.

The lists are the official scripts', without the two other cameras, which are not in the official average.
Where distractors lie beside the can is left to chance there, and drawn here from the episode's number.
Drawers are officially ray-traced.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from defi.benchmarks.simpler.episodes import TASKS, Episode, Look, Place, Placed, episodes

TABLES = {
    "base": Look(),
    "table 1": Look(stage="Baked_sc1_staging_objaverse_cabinet1_h870"),
    "table 2": Look(stage="Baked_sc1_staging_objaverse_cabinet2_h870"),
    "background 1": Look(stage="google_pick_coke_can_1_v4_alt_background"),
    "background 2": Look(stage="google_pick_coke_can_1_v4_alt_background_2"),
    "darker": Look(light="table, darker"),
    "brighter": Look(light="table, brighter"),
}
FLAT = "frl_apartment_stage_simple"
ROOMS = {
    "base": Look(FLAT, "room", station="mk_station"),
    "background 1": Look("modern_bedroom_no_roof", "room", station="mk_station"),
    "background 2": Look("modern_office_no_roof", "room", station="mk_station"),
    "brighter": Look(FLAT, "room, brighter", station="mk_station"),
    "darker": Look(FLAT, "room, darker", station="mk_station"),
    "cabinet 2": Look(FLAT, "room", station="mk_station2"),
    "cabinet 3": Look(FLAT, "room", station="mk_station3"),
}
DISTRACTORS = {
    "few distractors": ("opened_pepsi_can", "apple", "sponge", "orange"),
    "more distractors": (
        "opened_7up_can",
        "opened_sprite_can",
        "sponge",
        "orange",
        "opened_fanta_can",
        "bridge_spoon_generated_modified",
    ),
}


def _beside(can: Placed, models: tuple[str, ...], number: int) -> tuple[Placed, ...]:
    """More than 0.25 m from the can, on the table, turned like it."""
    random, placed = np.random.default_rng(number), [can]
    for model in models:
        while True:
            place = np.clip(can.xy + random.uniform(-0.3, 0.3, 2), (-0.5, 0.05), (-0.1, 0.35))
            if np.linalg.norm(place - can.xy) > 0.25:
                break
        xy: Place = (float(place[0]), float(place[1]))
        placed.append(Placed(model, xy, can.turn))
    return tuple(placed)


def _plain(placed: Placed) -> Placed:
    return replace(placed, model=placed.model.removeprefix("baked_"))


def _pick() -> Iterator[tuple[str, Episode]]:
    for name, look in (TABLES | dict.fromkeys(DISTRACTORS, Look())).items():
        for episode in episodes("google_robot_pick_coke_can")[:75]:
            objects = episode.objects
            if name in DISTRACTORS:
                objects = _beside(objects[0], DISTRACTORS[name], episode.index)
            yield f"{name}, {episode.setting}", replace(episode, objects=objects, look=look)


def _near() -> Iterator[tuple[str, Episode]]:
    task = replace(TASKS["google_robot_move_near_v0"], models="info_pick_custom_v0.json")
    for name, look in (TABLES | {"no distractor": Look()}).items():
        for episode in episodes(task.name)[:60]:
            objects, source, target = tuple(map(_plain, episode.objects)), episode.source, episode.target
            if name == "no distractor":
                objects, source, target = (objects[source], objects[target]), 0, 1
            yield name, replace(episode, task=task, objects=objects, source=source, target=target, look=look)


def _drawer(task: str) -> Iterator[tuple[str, Episode]]:
    for name, look in ROOMS.items():
        for x, y in product((0.65, 0.75, 0.85), (-0.2, 0.0, 0.2)):
            yield name, replace(episodes(task)[0], base=(x, y, 0.0), colours="", look=look)


def variants(task: str) -> list[Episode]:
    """A Google task's episodes of variant aggregation; `setting` is what officially is averaged within.

    Raises:
        KeyError: no such task, or a WidowX one: those have none.
    """
    kind = TASKS[task].kind
    rules = {"pick": _pick, "near": _near, "open": lambda: _drawer(task), "close": lambda: _drawer(task)}
    return [
        replace(episode, index=index, setting=setting, photo="")
        for index, (setting, episode) in enumerate(rules[kind]())
    ]
