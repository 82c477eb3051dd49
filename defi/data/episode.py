"""What a data set is to every stage, whatever its format: numbered frames, and episodes of them."""

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, groupby
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from defi.config import typed
from defi.data.motions import Motions, index_motions
from defi.errors import UserError, reading
from defi.robot.spec import Robot, Vector

Part = Literal["training", "held_out", "all"]
Frames = UInt8[np.ndarray, "N H W 3"]
LONGEST_NAME = 180  # bytes; folders take 255, with endings and the marks of unfinished files
HELD_OUT_EVERY = 20  # where a data set does not name its held-out part, every 20th recording is


@dataclass(frozen=True)
class Episode:
    """Consecutive frames of a data set, with what happens in them. Episodes may share frames.

    name: of its own in the data set, fit for a file. start: the number of its first frame in the data set.
    texts: the instruction of each frame, or one for all ("" where unknown).
    task: a short name of what is done, for counts ("" where there is none).
    """

    name: str
    start: int
    length: int
    texts: tuple[str, ...] = ("",)
    task: str = ""

    def text(self, position: int) -> str:
        """The instruction of a frame, counted from the episode's start."""
        return self.texts[position if len(self.texts) > 1 else 0]

    def sentences(self) -> Iterator[tuple[range, str]]:
        """Positions that follow each other with one instruction, and that instruction."""
        if len(self.texts) == 1:
            yield range(self.length), self.texts[0]
            return
        for text, same in groupby(range(self.length), self.text):
            positions = list(same)
            yield range(positions[0], positions[-1] + 1), text


class Dataset:
    """One part of a data set. Every format is a subclass.

    root: what the user named. fingerprint: identifies the data, wherever they lie; known_by_names: not
    quite, it is of names and sizes, which other data may have.
    stamp: of the files that hold actions and state, where the fingerprint does not tell that these changed.
    cameras: names, in order; the first is the one whose motion stage 2 names.
    fps: frames per second; None: it does not say, or recordings differ (`rate`).
    stored_step: steps of the recording from one frame to the next, where the data lack some.
    scope: what was opened, in words. left_out: what else the data set holds. faults: name → why it cannot be
    read, of recordings that are no episodes for that reason.
    action_names, state_names: of the numbers in an action and in the robot's state; none where it has none.
    normalisation: of actions and state, unless a setting says otherwise (`defi.robot.spec`).
    min_remaining: frames that follow where a sample of stage 3 starts, if the data set's benchmark says so.
    pair_distance: lowest and highest number of frames between the two of a pair of stage 2, unless a setting
    says otherwise.
    lengths, starts: frames of each episode, and the number of its first, as `episode` says: there may be
    millions of episodes, each made when asked for.
    """

    root: Path
    fingerprint: str
    stamp: str = ""
    known_by_names: bool = True
    cameras: tuple[str, ...]
    fps: float | None = None
    stored_step: int = 1
    normalisation: str = "bounds"
    min_remaining: int = 0
    pair_distance: Sequence[int] = (15, 15)
    scope: str
    left_out: Sequence[str] = ()
    faults: Mapping[str, str] = {}
    action_names: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()
    lengths: Int64[np.ndarray, " E"]
    starts: Int64[np.ndarray, " E"]

    def __len__(self) -> int:
        """Episodes."""
        return len(self.lengths)

    def episode(self, number: int) -> Episode:
        """An episode by its number, 0 … len − 1."""
        raise NotImplementedError

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        """Pictures of some frames, counted from the episode's start (in any order, repeated ones are fine).

        Raises:
            UserError: a file is missing or damaged.
        """
        raise NotImplementedError

    def check_files(self) -> None:
        """Raises UserError if frames with a file of their own lack it; none is opened."""

    def blocks(
        self, episode: Episode, size: int = 32, positions: range | None = None
    ) -> Iterator[tuple[range, dict[str, Frames]]]:
        """Positions of an episode's frames, all or some, and the pictures of all cameras, a few at a time."""
        positions = range(episode.length) if positions is None else positions
        for first in range(0, len(positions), size):
            block = positions[first : first + size]
            yield block, self.read(episode, block, self.cameras)

    def size(self) -> int:
        """Frames that a share in a mixture counts."""
        return int(self.lengths.sum())

    def rate(self, episode: Episode) -> float:
        """Frames per second. UserError if neither the data nor the settings say."""
        if self.fps is None:
            raise UserError(f"{self.root}: does not say its frames per second; give data.fps")
        return self.fps

    # ------------------------------------------------------------ actions and state

    @cached_property
    def motions(self) -> Motions:
        """Actions and state of the frames of all episodes. UserError if there are no actions."""
        if not self.action_names:
            raise UserError(
                f"{self.root}: holds no actions; give a robot's data, or name them (data.actions)"
            )
        return index_motions(self)

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        """Action and state, joined, of consecutive frames by their numbers; of no more than one episode, but
        where episodes share frames. UserError if they cannot be read."""
        raise NotImplementedError

    def robot(self) -> Robot:
        """What the data say of their robot; what they do not say is left open (`defi.robot.spec`)."""
        state = Vector.plain(self.state_names) if self.state_names else None
        return Robot(list(self.cameras), Vector.plain(self.action_names), state, self.fps)


def completed(robot: Robot, said: Mapping[str, Any], file: Path, parts: Iterable[str]) -> Robot:
    """A robot as data name its numbers, completed by a description beside them (`Robot`, as JSON): units,
    what is relative, the gripper, steps executed. parts: of actions and state, those that it is of.

    Raises:
        UserError: it is none, or of other numbers.
    """
    fix = "correct the robot there, or take it out"
    try:
        found = typed(Robot, said, "robot")
    except UserError as error:
        raise UserError(f"{file}: {error}; {fix}") from None
    for part in parts:
        if not (own := getattr(robot, part)):
            continue
        its = getattr(found, part) or Vector.plain(())
        if its.names != own.names:
            raise UserError(f"{file}: robot.{part}: names {its.names}, the data have {own.names}; {fix}")
        robot = replace(robot, **{part: replace(own, units=its.units, relative=its.relative)})
        if part == "actions":
            robot = replace(robot, gripper=found.gripper, executed=found.executed)
    return robot


@dataclass(kw_only=True)
class DataSettings:
    """What the section `data` says of any format; configs/data/<format>.yaml says more.

    split, held_out: what the data set calls its parts; None: as the format usually does.
    cameras: which ones, in order, as `name` or `name:place in the data`; None: all, or the format's usual.
    """

    root: str
    split: str | None = None
    held_out: str | None = None
    cameras: list[str] | None = None

    def open(self, part: Part) -> Dataset:
        """What is trained on, what is held out, or all that there is (for labels, say).

        Raises:
            UserError: what is missing or damaged is named.
        """
        raise NotImplementedError

    def holds_out(self) -> bool:
        """Whether there is a held-out part."""
        return True

    def wordless(self) -> Self:
        """These, but of all recordings, if they do not say which: for what needs no instructions."""
        return self

    def places(self) -> dict[str, str]:
        """Camera → its place in the data, of those that are named."""
        named = (each.partition(":") for each in self.cameras or ())
        return {name: place or name for name, _, place in named}


def of_part(items: Sequence, part: Part) -> list:
    """The items of a part, where a data set does not name its parts: every 20th is held out.

    Of fewer than 20, the last; of one, it is in both.
    """
    if part == "all" or len(items) == 1:
        return list(items)
    every = min(HELD_OUT_EVERY, len(items))
    return [item for number, item in enumerate(items, 1) if (number % every == 0) == (part == "held_out")]


def share_of(tasks: Sequence[str], share: float) -> list[int]:
    """Places, in order, of a share of the episodes of each task, rounded up: the same ones always."""
    drawn, chosen = np.random.default_rng(0).permutation(len(tasks)), defaultdict[str, list[int]](list)
    for number in drawn.tolist():
        chosen[tasks[number]].append(number)
    return sorted(n for each in chosen.values() for n in each[: math.ceil(share * len(each) - 1e-9)])


def file_name(text: str) -> str:
    """A text as a file's name: what is not a letter, digit, dot or dash becomes an underscore.

    Of one that is too long, or not UTF-8, the start is kept, and a hash of all of it.
    """
    name = re.sub(r"[^\w.\-]+", "_", text).strip("._") or "_"
    start = os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore")
    return name if start == name else f"{start}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def file_stamp(files: Iterable[Path]) -> str:
    """A hash that changes with files: of their paths, sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        with reading(file, "copy the data set again"):
            found = file.stat()
        digest.update(f"{file.absolute()} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def distinct(names: Iterable[str]) -> list[str]:
    """Names, with numbers after those that occurred before; no number makes a name that another has."""
    names = list(names)
    taken, numbers = set(names), defaultdict[str, Iterator[int]](lambda: count(2))
    found: dict[str, None] = {}  # ordered, and quick to search
    for name in names:
        if name in found:
            name = next(new for number in numbers[name] if (new := f"{name}-{number}") not in taken)
        found[name] = None
    return list(found)
