"""Collection cut into units, so that any number of processes gives the same data and a killed run can go on.

A unit is a stretch of play in one world, with a random generator of its own. It is written to
`.units/<split>-<index>/` (with `.part` added until it is complete); once all units are there, the frames get
their numbers in the order of the units, and the index files are written.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from defi.calvin import Span, frame_name, index_files
from defi.engine.output import write_file
from defi.errors import UserError
from defi.sim import scenes
from defi.sim.experts import EXPERT_TASKS
from defi.sim.play import Player, PlaySettings, Record, Recorder, unit_frame
from defi.sim.scene import SceneConfig
from defi.sim.tasks import INSTRUCTIONS
from defi.sim.world import World

UNITS, RECORD = ".units", "record.json"


@dataclass(frozen=True)
class Share:
    """One split: scenes, random variations of each besides the scene itself, demonstrations per task."""

    scenes: tuple[str, ...]
    variations: int
    demos_per_task: int
    phrasings: int | None  # how many instructions per task (None: all)


@dataclass(frozen=True)
class Settings:
    """Everything that the data depend on; see configs/collect.yaml."""

    seed: int
    tasks: tuple[str, ...]
    splits: dict[str, Share]
    demos_per_unit: int
    static_size: int
    gripper_size: int
    play: PlaySettings


@dataclass(frozen=True)
class Unit:
    """A stretch of play: `variation` None is the scene itself."""

    split: str
    index: int
    scene: str
    variation: int | None
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:05d}"


def plan(settings: Settings) -> list[Unit]:
    """The units of all splits. Tasks are dealt out in rounds: every scene sees about as many of each."""
    return [unit for split in settings.splits for unit in _plan_split(settings, split)]


def _plan_split(settings: Settings, split: str) -> Iterator[Unit]:
    share = settings.splits[split]
    rng = np.random.default_rng([settings.seed, *split.encode()])
    rounds = [rng.permutation(settings.tasks) for _ in range(share.demos_per_task)]
    if not rounds:
        return
    dealt = np.concatenate(rounds)
    hands = np.array_split(dealt, -(-len(dealt) // settings.demos_per_unit))
    index = 0
    # Scene by scene: scene_info.npy holds one range of frames per scene.
    for s, scene in enumerate(share.scenes):
        for i, tasks in enumerate(hands[s :: len(share.scenes)]):
            variation = i % (share.variations + 1)
            yield Unit(split, index, scene, variation or None, tuple(tasks.tolist()))
            index += 1


def scene_of(unit: Unit, settings: Settings) -> SceneConfig:
    if unit.variation is None:
        return scenes.builtin(unit.scene)
    return scenes.variation(unit.scene, settings.seed * 100_000 + unit.variation)


def collect_unit(unit: Unit, settings: Settings, output: Path) -> Record:
    """Play one unit and write it; a unit that is already there is only read."""
    folder = output / UNITS / unit.name
    if folder.is_dir():
        return read_record(folder)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng = np.random.default_rng([settings.seed, *unit.split.encode(), unit.index])
    phrasings = {task: INSTRUCTIONS[task][: settings.splits[unit.split].phrasings] for task in settings.tasks}
    with World(
        scene_of(unit, settings), static_size=settings.static_size, gripper_size=settings.gripper_size
    ) as world:
        player = Player(
            world,
            Recorder(part),
            phrasings=phrasings,
            available=EXPERT_TASKS,
            settings=settings.play,
            rng=rng,
        )
        record = player.play(unit.tasks)
    write_file(part / RECORD, json.dumps(record.to_json()))
    os.replace(part, folder)
    return record


def read_record(folder: Path) -> Record:
    return Record.from_json(json.loads((folder / RECORD).read_text()))


def run(
    units: Sequence[Unit], settings: Settings, output: Path, workers: int
) -> Iterator[tuple[Unit, Record]]:
    """Collect all units over `workers` processes; yields each as it is finished."""
    work = partial(collect_unit, settings=settings, output=output)
    if workers == 1:
        yield from ((unit, work(unit)) for unit in units)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)
    try:
        futures = {pool.submit(work, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise UserError(
            f"{output}: a worker died (out of memory?); continue with resume=true and fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Make this worker end when the main process is killed: a run that resumes must find nobody writing."""

    def watch() -> None:
        wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def assemble(units: Sequence[Unit], settings: Settings, output: Path) -> None:
    """Number the frames in the order of the units and write the index files. Can be repeated after a kill."""
    for split in settings.splits:
        _assemble_split([unit for unit in units if unit.split == split], settings, output)


def _assemble_split(units: Sequence[Unit], settings: Settings, output: Path) -> None:
    folder = output / units[0].split
    folder.mkdir(exist_ok=True)
    first, episodes, spans, ranges = 0, [], [], {}
    for unit in units:
        source = output / UNITS / unit.name
        record = read_record(source)
        for i in range(record.frames):
            if (source / unit_frame(i)).exists():  # else a killed run had already moved it
                os.replace(source / unit_frame(i), folder / frame_name(first + i))
        episodes += [(first + start, first + end) for start, end in record.episodes]
        spans += [
            Span(first + span.start, first + span.end, span.instruction, span.task) for span in record.spans
        ]
        if record.frames:
            start, _ = ranges.get(unit.scene, (first, 0))
            first += record.frames
            ranges[unit.scene] = (start, first - 1)
    for name, content in index_files(episodes, spans, ranges).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, content)
