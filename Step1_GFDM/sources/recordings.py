"""What a source of captioned video gives: recordings, and each one's scene when it is read."""

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError

HELD_OUT_EVERY = 20  # where a source does not name its held-out part, every 20th recording is
LONGEST_NAME = 180  # bytes; folders take 255, with endings and the marks of unfinished files

Item = TypeVar("Item")


@dataclass(frozen=True)
class Scene:
    """What a recording shows: frames per camera (of one length), what happens in words, frames per second."""

    views: dict[str, UInt8[np.ndarray, "F H W 3"]]
    texts: list[str]
    fps: float


@dataclass(frozen=True)
class Recording:
    """One episode: its name, fit for a file, and what reads it (UserError where it is damaged)."""

    id: str
    read: Callable[[], Scene]


@dataclass(frozen=True)
class Recordings:
    """One split of a source. fingerprint: identifies the data."""

    items: list[Recording]
    cameras: list[str]
    fingerprint: str

    @classmethod
    def of_files(cls, items: list[Recording], cameras: list[str], known: str | None = None) -> "Recordings":
        """With distinct names, by which they are known, or by the text `known`."""
        items = distinct(items)
        return cls(items, cameras, _digest("\n".join(item.id for item in items) if known is None else known))


@dataclass
class CaptionedSource:
    """The settings of a source, the `data` section of a configuration; each kind of source is a subclass.

    splits: ours -> the source's. every: take every n-th frame. Clips are made of what is taken:
    `Step1_GFDM.data` finds it in the manifest.
    """

    known_by_names: ClassVar[bool] = False  # the fingerprint is of names alone: other files may have the same

    source: str
    root: str
    splits: dict[str, str | None]
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"data.every={self.every}: must be at least 1")

    def open(self, split: str) -> Recordings:
        """Recordings of our split `train` or `val`. Raises UserError for what is missing."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What decides how episodes look, for JSON; the place only where the fingerprint may not tell."""
        values = {key: value for key, value in asdict(self).items() if key not in ("root", "index")}
        return values | ({"root": str(Path(self.root).resolve())} if self.known_by_names else {})

    def theirs(self, split: str) -> str:
        """What the source calls our split. Raises UserError if the settings do not say."""
        if not (name := self.splits.get(split)):
            raise UserError(f"data.splits.{split}={name}: give what data.source={self.source} calls it")
        return name

    def place_and_part(self, split: str) -> tuple[Path, bool | None]:
        """Of files that may know no splits: where ours lies; which `part` of it, where `val` has no name."""
        named = self.splits.get("val") is not None
        return Path(self.root, self.theirs(split if named else "train")), None if named else split == "val"


def part(items: Sequence[Item], held_out: bool | None) -> list[Item]:
    """All items (None), every 20th (True), or the others (False).

    Of fewer than 20 the last is held out; a single one is both trained on and held out.
    """
    if held_out is None or len(items) < 2:
        return list(items)
    chosen = set(range(HELD_OUT_EVERY - 1, len(items), HELD_OUT_EVERY)) or {len(items) - 1}
    return [item for number, item in enumerate(items) if (number in chosen) == held_out]


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def file_name(text: str) -> str:
    """A text as a file's name: what is not a letter, digit, dot or dash becomes an underscore."""
    return shortened(re.sub(r"[^\w.\-]+", "_", text).strip("._") or "_")


def shortened(name: str) -> str:
    """Of a name that is too long for a file, or not UTF-8, the start is kept, and a hash of all of it."""
    start = os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore")
    return name if start == name else f"{start}-{_digest(name)}"


def distinct(recordings: list[Recording]) -> list[Recording]:
    """With numbers after the names that occur more than once; no number makes a name of another recording."""
    given = {recording.id for recording in recordings}
    numbers: dict[str, Iterator[int]] = {}
    named = []
    for recording in recordings:
        name = recording.id
        if name in numbers:
            name = next(new for n in numbers[name] if (new := f"{recording.id}-{n}") not in given)
        else:
            numbers[name] = itertools.count(2)
        named.append(Recording(name, recording.read))
    return named
