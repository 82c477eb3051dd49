"""Collection in sessions, so that any number of processes gives the same data and a killed run can resume.

A session is a stretch of play in one world, with a random generator of its own. It is written to
`.sessions/<split>-<index>/` (with `.part` added until it is complete); once all are there, the frames get
their numbers in the order of the sessions, and the index files are written.
"""

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from defi.collecting import NOISE, NOT_NEGATIVE, POSITIVE, SHARE, check_ranges
from defi.data.calvin import TRAINING, VALIDATION, Span, encode_frame, frame_name, index_files
from defi.engine.output import write_file
from defi.errors import UserError
from defi.files import read_json
from defi.sim.play import PlayConfig, Player
from defi.sim.scenes import SCENES, builtin, variation
from defi.sim.tasks import INSTRUCTIONS, TASKS, check_tasks
from defi.sim.world import World

SESSIONS, RECORD = ".sessions", "record.json"
UNSEEN = "D"
AT_LEAST_1 = ("workers", "demos_per_task", "demos_per_session", "static_size", "gripper_size", "play.hold")
AT_LEAST_1 += ("play.max_steps", "play.attempts")
RANGES = dict.fromkeys(AT_LEAST_1, POSITIVE)
RANGES |= dict.fromkeys(("seed", "variations", "validation.demos_per_task"), NOT_NEGATIVE)
RANGES |= {f"play.{key}": limits for key, limits in NOISE.items()}
RANGES |= dict.fromkeys(("play.reset", "play.random_arm", "play.at_once"), SHARE)


@dataclass
class SplitConfig:
    """What a split is collected from; for training it stands at the top level of `CollectConfig`."""

    scenes: Any
    demos_per_task: int
    variations: int = 0


@dataclass
class CollectConfig:
    """Settings of `python -m defi.sim.collect`, checked; configs/collect.yaml says what each one is."""

    seed: int
    output: str
    resume: bool
    overwrite: bool
    record: bool
    workers: int
    tasks: Any
    scenes: Any
    variations: int
    demos_per_task: int
    validation: SplitConfig
    demos_per_session: int
    static_size: int
    gripper_size: int
    play: PlayConfig

    def __post_init__(self) -> None:
        names = {"tasks": self.tasks, "scenes": self.scenes, "validation.scenes": self.validation.scenes}
        for key, value in names.items():
            names[key] = list(map(str, value if isinstance(value, list) else [value]))  # or a single name
            if not names[key]:
                raise UserError(f"{key}=[]: name at least one")
            if key != "tasks" and (unknown := set(names[key]) - set(SCENES)):
                raise UserError(f"{key}: there is no scene {min(unknown)}; choose from {', '.join(SCENES)}")
        self.tasks, self.scenes, self.validation.scenes = names.values()
        self.tasks = list(TASKS if self.tasks == ["all"] else check_tasks(self.tasks))
        if self.variations and UNSEEN in self.scenes:
            raise UserError(f"scenes: {UNSEEN} has no variations to train on; set variations=0")
        check_ranges(self, RANGES)

    @property
    def splits(self) -> dict[str, SplitConfig]:
        """Those that are collected."""
        training = SplitConfig(self.scenes, self.demos_per_task, self.variations)
        splits = {TRAINING: training, VALIDATION: self.validation}
        return {name: split for name, split in splits.items() if split.demos_per_task}

    def identity(self) -> dict[str, Any]:
        """The settings that the data depend on."""
        others = "output", "resume", "overwrite", "workers"
        return {key: value for key, value in asdict(self).items() if key not in others}


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
                chosen = i % (split.variations + 1) or None
                sessions.append(Session(name, next(number), scene, chosen, tuple(tasks.tolist())))
    return sessions


def collect_session(session: Session, config: CollectConfig, output: Path) -> Record:
    """Play one session and write what was solved; a session that is already there is only read."""
    folder = session.folder(output)
    if folder.is_dir():
        return Record.read(folder)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng = np.random.default_rng([config.seed, *session.split.encode(), session.index])
    scene = builtin(session.scene)
    if session.variation is not None:
        scene = variation(session.scene, config.seed * 100_000 + session.variation)
    sizes = {"static_size": config.static_size, "gripper_size": config.gripper_size}
    record, several = Record(), None if session.split == TRAINING else 1  # in validation always the first
    with World(scene, cameras=("static", "gripper") if config.record else (), **sizes) as world:
        for attempt in Player(world, config.play, rng).play(session.tasks):
            summary = {"task": attempt.task, "solved_after": attempt.solved_after}
            summary |= {"disturbed": attempt.disturbed, "steps": len(attempt.frames)}
            record.attempts.append(summary)
            if not config.record or attempt.solved_after is None:
                continue
            first, record.frames = record.frames, record.frames + len(attempt.frames)
            for number, frame in enumerate(attempt.frames, first):
                (part / frame_name(number)).write_bytes(encode_frame(frame))
            start, last = record.episodes.pop()[0] if attempt.continues else first, record.frames - 1
            record.episodes.append([start, last])
            if attempt.task in config.tasks:
                words = str(rng.choice(INSTRUCTIONS[attempt.task][:several]))
                record.spans.append(asdict(Span(first, last, words, attempt.task)))
    write_file(part / RECORD, json.dumps(asdict(record)))
    os.replace(part, folder)
    return record


def assemble(sessions: Sequence[Session], output: Path) -> None:
    """Number a split's frames in the order of its sessions, write its index files. A kill does no harm."""
    folder = output / sessions[0].split
    folder.mkdir(exist_ok=True)
    first, episodes, spans, scene_frames = 0, [], [], {}
    for session in sessions:
        source = session.folder(output)
        record = Record.read(source)
        for i in range(record.frames):
            if (source / frame_name(i)).exists():  # else a killed run had already moved it
                os.replace(source / frame_name(i), folder / frame_name(first + i))
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
