"""The frame numbers of a folder's videos: each is decoded once, so that a later start opens none of them.

    <root>/.defi/frames.jsonl   a line per video: [path below root, bytes, time of change in ns, VERSION,
                                and `Numbering`'s values, or why it has none]

Where the folder cannot be written to, the file lies in the user's cache. A video is decoded again when its
size or time of change is another one, and when `VERSION` is.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import astuple
from pathlib import Path
from time import monotonic

from rich.progress import track

from defi.engine.output import take_turn, user_cache, write_file
from defi.errors import UserError
from defi.video import Numbering, number_video

VERSION = 4  # of the rule by which frames are numbered
INDEX = "frames.jsonl"
PART = 100  # videos between two looks at the clock
PAUSE = 60  # seconds after which the index is written, should the work be interrupted
MOST_FRAMES = 10**9
LONGEST = 2**20  # bytes of a line; paths have at most 4096, some thousand starts the rest
FEWEST = 1000  # videos for whose lines there is always space

Stamps = dict[str, tuple[int, int]]  # name -> bytes and time of change in ns; zeros: the file is not there
Found = Numbering | str  # or why it has none


def number_videos(root: Path, files: Sequence[Path]) -> list[Numbering | UserError]:
    """The frame numbers of each of a folder's videos, or why it has none.

    One process of a training numbers what no index knows, and writes it down; the others wait.
    """
    names = [file.relative_to(root).as_posix() for file in files]
    stamps: Stamps = {name: _stamp(root / name) for name in names}
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    places = [root / ".defi", user_cache() / "videos" / digest]
    known = _known(places, stamps)
    if known.keys() != stamps.keys():
        place, turn = None, nullcontext()
        for folder in places:
            with suppress(OSError):  # a folder that is read only, say
                place, turn = folder, take_turn(folder)
                break
        with turn:
            known = _known(places, stamps, others_below=root)  # another part's, which stay in the index
            _number_missing(root, stamps, known, place)
    found = ((root / name, known[name]) for name in names)
    return [UserError(f"{file}: {fault}") if isinstance(fault, str) else fault for file, fault in found]


def _stamp(file: Path) -> tuple[int, int]:
    with suppress(OSError, ValueError):  # ValueError: no name of a file
        stat = file.stat()
        return stat.st_size, stat.st_mtime_ns
    return 0, 0


def _known(places: Sequence[Path], stamps: Stamps, others_below: Path | None = None) -> dict[str, Found]:
    """What the indices say of videos that are still as they were; of others too, whose stamps are added.

    An index may come with the videos from others: what is damaged says nothing, and it is read line by line,
    so as not to fill the memory.
    """
    known: dict[str, Found] = {}
    for file in (place / INDEX for place in places):
        with suppress(OSError):
            if not file.is_file() or file.stat().st_size > LONGEST * max(FEWEST, len(stamps)):
                continue
            with file.open("rb") as stream:
                while line := stream.readline(LONGEST):
                    with suppress(ValueError, TypeError, RecursionError, OSError):
                        name, size, changed, version, *found = json.loads(line)
                        stamp = stamps.get(name)
                        if stamp is None and others_below and size:
                            stamp = _stamp(others_below / name)
                        if version == VERSION and stamp == (size, changed):
                            known[name], stamps[name] = _checked(*found), stamp
    return known


def _checked(frames: int | str, starts: Sequence = (), rate: float | None = None) -> Found:
    """What a line says of a video. Raises ValueError or TypeError if that is nothing."""
    if isinstance(frames, str):
        return frames
    numbers, times = zip(*starts)
    integers = (frames, *numbers, *(time for time in times if time is not None))
    valid = all(type(n) is int and abs(n) < 2**63 for n in integers) and 0 < frames < MOST_FRAMES
    valid = valid and (rate is None or (type(rate) is float and 0 < rate < math.inf))
    if not valid or numbers[0] != 0 or list(numbers) != sorted(numbers):
        raise ValueError
    return Numbering(frames, tuple(zip(numbers, times)), rate)


def _number_missing(root: Path, stamps: Stamps, known: dict[str, Found], place: Path | None) -> None:
    """Add to `known` what is missing in it, written to the index in `place` on the way."""

    def number(name: str) -> Found:
        try:
            return number_video(root / name)
        except UserError as error:
            return str(error).removeprefix(f"{root / name}: ")  # the folder may be moved

    missing, due = [name for name in stamps if name not in known], monotonic() + PAUSE
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for first in track(range(0, len(missing), PART), "frames of videos", transient=True):
            part = missing[first : first + PART]
            known |= zip(part, pool.map(number, part))
            if place is None or (monotonic() < due and part[-1] != missing[-1]):
                continue
            values = {
                name: (found,) if isinstance(found, str) else astuple(found) for name, found in known.items()
            }
            lines = (json.dumps([name, *stamps[name], VERSION, *values[name]]) + "\n" for name in known)
            try:
                write_file(place / INDEX, "".join(lines))
            except OSError as error:
                what = f"not written ({error.strerror}); frames will be counted again"
                warnings.warn(f"{place / INDEX}: {what}", stacklevel=2)
            due = monotonic() + PAUSE
