"""Collection in sessions, so that any number of processes gives the same data and a killed run can go on.

A session is a stretch of play in one world, with a random generator of its own. It is written to
`.sessions/<split>-<index>/` (with `.part` added until it is complete); once all are there, the frames get
their numbers in the order of the sessions, and the index files are written.
"""

import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from defi.calvin import Span, encode_frame, frame_name, index_files
from defi.engine.output import write_file
from defi.errors import UserError
from defi.files import read_json
from defi.sim import scenes
from defi.sim.collect.config import CollectConfig
from defi.sim.collect.play import Attempt, Player
from defi.sim.world import World

SESSIONS, RECORD = ".sessions", "record.json"


@dataclass(frozen=True)
class Session:
    """A stretch of play: `variation` None is the scene itself."""

    split: str
    index: int
    scene: str
    variation: int | None
    tasks: tuple[str, ...]

    def folder(self, output: Path) -> Path:
        return output / SESSIONS / f"{self.split}-{self.index:05d}"


@dataclass
class Record:
    """A session's `record.json`: number of frames, recordings [first, last], `Span`s, every attempt."""

    frames: int = 0
    episodes: list[list[int]] = field(default_factory=list)
    spans: list[dict] = field(default_factory=list)
    attempts: list[dict] = field(default_factory=list)

    def add(
        self, attempt: Attempt, folder: Path, phrasings: Sequence[str] | None, rng: np.random.Generator
    ) -> None:
        """Write a demonstration's frames; with phrasings to choose from, it gets a span."""
        first, self.frames = self.frames, self.frames + len(attempt.frames)
        for number, frame in enumerate(attempt.frames, first):
            (folder / session_frame(number)).write_bytes(encode_frame(frame))
        start = self.episodes.pop()[0] if attempt.continues else first
        self.episodes.append([start, self.frames - 1])
        if phrasings:
            self.spans.append(asdict(Span(first, self.frames - 1, str(rng.choice(phrasings)), attempt.task)))

    @classmethod
    def read(cls, folder: Path) -> "Record":
        return cls(**read_json(folder / RECORD, "delete this folder, then continue with resume=true"))


def plan(config: CollectConfig) -> list[Session]:
    """The sessions of all splits. Tasks are dealt out in rounds: every scene sees about as many of each."""
    sessions = []
    for name, split in config.splits.items():
        rng = np.random.default_rng([config.seed, *name.encode()])
        dealt = np.concatenate([rng.permutation(config.tasks) for _ in range(split.demos_per_task)])
        hands = np.array_split(dealt, -(-len(dealt) // config.demos_per_session))
        number = itertools.count()
        # Scene by scene: scene_info.npy holds one range of frames per scene.
        for s, scene in enumerate(split.scenes):
            for i, tasks in enumerate(hands[s :: len(split.scenes)]):
                variation = i % (split.variations + 1) or None
                sessions.append(Session(name, next(number), scene, variation, tuple(tasks.tolist())))
    return sessions


def collect_session(session: Session, config: CollectConfig, output: Path) -> Record:
    """Play one session and write it; one that is already there is only read."""
    folder = session.folder(output)
    if folder.is_dir():
        return Record.read(folder)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng = np.random.default_rng([config.seed, *session.split.encode(), session.index])
    scene = scenes.builtin(session.scene)
    if session.variation is not None:
        scene = scenes.variation(session.scene, config.seed * 100_000 + session.variation)
    sizes = {"static_size": config.static_size, "gripper_size": config.gripper_size}
    with World(scene, cameras=("static", "gripper") if config.record else (), **sizes) as world:
        record = Record()
        for attempt in Player(world, config.play, rng).play(session.tasks):
            record.attempts.append(attempt.summary())
            if config.record and attempt.solved_after is not None:
                record.add(attempt, part, config.phrasings(session.split).get(attempt.task), rng)
    write_file(part / RECORD, json.dumps(asdict(record)))
    os.replace(part, folder)
    return record


def session_frame(index: int) -> str:
    return f"{index:06d}.npz"


def collect_sessions(
    sessions: Sequence[Session], config: CollectConfig, output: Path
) -> Iterator[tuple[Session, Record]]:
    """Collect over `config.workers` processes; yields each session as it is finished."""
    work = partial(collect_session, config=config, output=output)
    if config.workers == 1:
        yield from ((session, work(session)) for session in sessions)
        return
    pool = ProcessPoolExecutor(config.workers, get_context("spawn"), initializer=_end_with_parent)
    try:
        futures = {pool.submit(work, session): session for session in sessions}
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


def assemble(sessions: Sequence[Session], output: Path) -> None:
    """Number a split's frames in the order of its sessions, write its index files. A kill does no harm."""
    folder = output / sessions[0].split
    folder.mkdir(exist_ok=True)
    first, episodes, spans, scene_frames = 0, [], [], {}
    for session in sessions:
        source = session.folder(output)
        record = Record.read(source)
        for i in range(record.frames):
            if (source / session_frame(i)).exists():  # else a killed run had already moved it
                os.replace(source / session_frame(i), folder / frame_name(first + i))
        episodes += [(first + start, first + end) for start, end in record.episodes]
        for span in record.spans:
            spans.append(Span(**span | {key: first + span[key] for key in ("start", "end")}))
        if record.frames:
            start, _ = scene_frames.get(session.scene, (first, 0))
            first += record.frames
            scene_frames[session.scene] = (start, first - 1)
    for name, content in index_files(episodes, spans, scene_frames).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, content)
