"""The frame numbers of a folder's videos: each is decoded once, so that a later start opens none of them.

    <root>/.defi/frames.jsonl   a line per video: [path below root, bytes, time of change in ns, VERSION,
                                and `Numbering`'s frames and starts, or why it has none]

Where the folder cannot be written to, the file lies in the user's cache. A video is decoded again when its
size or time of change is another one, and when `VERSION` is.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from time import monotonic

from rich.progress import Progress

from defi.cache import take_turn, user_cache
from defi.engine.output import write_file
from defi.errors import UserError
from defi.film import Numbering, number_video

VERSION = 2  # of the rule by which frames are numbered
INDEX = "frames.jsonl"
PART = 100  # videos that are given out at once
PAUSE = 60  # seconds after which the index is written, should the work be interrupted
MOST_FRAMES = 10**9
LONGEST = 2**20  # bytes of a line; paths have at most 4096, some thousand starts the rest
FEWEST = 1000  # videos for whose lines there is always room

Stamp = tuple[int, int] | None  # bytes and time of change in ns; None: the file is not there
Entry = tuple[Stamp, Numbering | str]  # or the fault


def number_videos(root: Path, files: Sequence[Path]) -> list[Numbering | UserError]:
    """The frame numbers of each of a folder's videos, or why it has none."""
    stamps = {file.relative_to(root).as_posix(): _stamp(file) for file in files}
    places = _places(root)
    known = _known(places, stamps)
    if len(known) < len(stamps):
        known = _number_missing(root, stamps, places)
    found = ((root / name, known[name][1]) for name in stamps)
    return [UserError(f"{file}: {said}") if isinstance(said, str) else said for file, said in found]


def _places(root: Path) -> list[Path]:
    """Folders that may hold the index, in order of preference."""
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return [root / ".defi", user_cache() / "videos" / digest]


def _known(places: Sequence[Path], stamps: dict[str, Stamp]) -> dict[str, Entry]:
    """What the indices say of videos that are still as they were. A damaged index says nothing."""
    known: dict[str, Entry] = {}
    for place in places:
        for name, stamp, found in _lines(place / INDEX, LONGEST * max(FEWEST, len(stamps))):
            if stamps.get(name) == stamp:
                known[name] = (stamp, found)
    return known


def _lines(file: Path, largest: int) -> Iterator[tuple[str, Stamp, Numbering | str]]:
    """Lines of an index, read one by one: it may be a stranger's, and shall not fill the memory."""
    try:
        if not file.is_file() or file.stat().st_size > largest:
            return
        with file.open("rb") as stream:
            while line := stream.readline(LONGEST):
                with suppress(ValueError, TypeError, RecursionError):
                    name, size, changed, version, *found = json.loads(line)
                    if version == VERSION and isinstance(name, str):
                        yield name, (size, changed), _checked(*found)
    except OSError:
        return


def _checked(frames: int | str, starts: Sequence = ()) -> Numbering | str:
    """What a line says of a video. Raises ValueError or TypeError if that is nothing."""
    if isinstance(frames, str):
        return frames
    numbers, times = [number for number, _ in starts], [time for _, time in starts if time is not None]
    if not all(type(n) is int and abs(n) < 2**63 for n in (frames, *numbers, *times)):
        raise TypeError
    if not 0 < frames < MOST_FRAMES or numbers != sorted(numbers) or numbers[:1] not in ([], [0]):
        raise ValueError
    return Numbering(frames, tuple((number, time) for number, time in starts))


def _number_missing(root: Path, stamps: dict[str, Stamp], places: Sequence[Path]) -> dict[str, Entry]:
    """Number what no index knows, and write it down; one process of a training does, the others wait."""
    for place in places:
        try:
            turn = take_turn(place)
        except OSError:  # a folder that is read only, say
            continue
        with turn:
            return _number(root, stamps, _known(places, stamps), place)
    return _number(root, stamps, {}, None)


def _number(
    root: Path, stamps: dict[str, Stamp], known: dict[str, Entry], place: Path | None
) -> dict[str, Entry]:
    """`known` and all that was missing in it."""
    missing = [name for name in stamps if name not in known]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, Progress(transient=True) as progress:
        bar, due = progress.add_task("frames of videos", total=len(missing)), monotonic() + PAUSE
        for first in range(0, len(missing), PART):
            part = missing[first : first + PART]
            for name, found in zip(part, pool.map(_numbering, [root / name for name in part])):
                known[name] = (stamps[name], found)
                progress.advance(bar)
            if place is not None and (monotonic() >= due or part[-1] == missing[-1]):
                _write(place / INDEX, known)
                due = monotonic() + PAUSE
    return known


def _write(file: Path, known: dict[str, Entry]) -> None:
    lines = (
        [name, *(stamp or (0, 0)), VERSION, *([found] if isinstance(found, str) else astuple(found))]
        for name, (stamp, found) in known.items()
    )
    try:
        write_file(file, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        warnings.warn(f"{file}: not written ({error.strerror}); frames will be counted again", stacklevel=2)


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _numbering(file: Path) -> Numbering | str:
    """Its frame numbers, or why it has none."""
    try:
        return number_video(file)
    except UserError as error:
        return str(error).removeprefix(f"{file}: ")  # the folder may be moved
