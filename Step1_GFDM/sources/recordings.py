"""What a source of captioned video gives: recordings, and each one's scene when it is read."""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import UInt8

HELD_OUT_EVERY = 20  # where a source does not name its held-out part, every 20th recording is
LONGEST_NAME = 180  # bytes; folders take 255, with endings and the marks of unfinished files

Item = TypeVar("Item")


@dataclass(frozen=True)
class Recording:
    """One episode: its name, fit for a file, and where its source finds it."""

    id: str
    place: Any


@dataclass(frozen=True)
class Scene:
    """What a recording shows: frames per camera (of one length), what happens in words, frames per second."""

    views: dict[str, UInt8[np.ndarray, "F H W 3"]]
    texts: list[str]
    fps: float


class Source(Protocol):
    """One split of a data set."""

    recordings: Sequence[Recording]
    cameras: list[str]

    @property
    def fingerprint(self) -> str:
        """Identifies the data."""
        ...

    def read(self, recording: Recording, every: int) -> Scene:
        """Every `every`-th frame of a recording.

        Raises:
            UserError: it is damaged; the file is named.
        """
        ...


def file_name(text: str) -> str:
    """A text as a file's name: what is not a letter, digit, dot or dash becomes an underscore."""
    return shortened(re.sub(r"[^\w.\-]+", "_", text).strip("._") or "_")


def shortened(name: str) -> str:
    """Of a name that is too long for a file, or not UTF-8, the start is kept, and a hash of all of it."""
    coded = os.fsencode(name)
    start = coded[:LONGEST_NAME].decode(errors="ignore")
    return name if start == name else f"{start}-{hashlib.sha256(coded).hexdigest()[:16]}"


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
        named.append(Recording(name, recording.place))
    return named


def part(items: Sequence[Item], held_out: bool | None) -> list[Item]:
    """All items (None), every 20th (True), or the others (False).

    Of fewer than 20 the last is held out; a single one is both trained on and held out.
    """
    if held_out is None or len(items) < 2:
        return list(items)
    chosen = set(range(HELD_OUT_EVERY - 1, len(items), HELD_OUT_EVERY)) or {len(items) - 1}
    return [item for number, item in enumerate(items) if (number in chosen) == held_out]
