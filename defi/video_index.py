"""How many frames the videos of a folder have: counted once, so that a later start opens none of them.

    <root>/.defi/frames.jsonl   a line per video: [path below root, bytes, time of change in ns, frames]

Instead of frames a line may say why there are none. Where the folder cannot be written to, the file lies in
the user's cache. A video is opened again when its size or time of change is another one.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.progress import Progress

from defi.cache import take_turn, user_cache
from defi.engine.output import write_file
from defi.errors import UserError
from defi.video import frame_count

INDEX = "frames.jsonl"
OPENERS = 8  # videos that are opened at the same time
PART = 2000  # videos after which the index is written, should the counting be interrupted
MOST_FRAMES = 10**9
LONGEST = 2**16  # bytes of a line; paths have at most 4096
FEWEST = 1000  # videos for whose lines there is always room

Entry = tuple[int | str, ...]  # bytes, time of change in ns, frames or the fault
Stamp = tuple[int, int] | None  # bytes and time of change in ns; None: the file is not there


def count_frames(root: Path, files: Sequence[Path]) -> list[int | UserError]:
    """Frames of each of a folder's videos, or why it cannot be read."""
    stamps = {file.relative_to(root).as_posix(): _stamp(file) for file in files}
    places = _places(root)
    known = _known(places, stamps)
    if len(known) < len(stamps):
        known = _count_missing(root, stamps, places)
    found = ((root / name, known[name][2]) for name in stamps)
    return [UserError(f"{file}: {said}") if isinstance(said, str) else said for file, said in found]


def _places(root: Path) -> list[Path]:
    """Folders that may hold the index, in order of preference."""
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return [root / ".defi", user_cache() / "videos" / digest]


def _known(places: Sequence[Path], stamps: dict[str, Stamp]) -> dict[str, Entry]:
    """What the indices say of videos that are still as they were. A damaged index says nothing."""
    known: dict[str, Entry] = {}
    for place in places:
        for name, *entry in _lines(place / INDEX, LONGEST * max(FEWEST, len(stamps))):
            if (stamp := stamps.get(name)) and stamp == tuple(entry[:2]):
                known[name] = tuple(entry)
    return known


def _lines(file: Path, largest: int) -> Iterator[list[Any]]:
    """Lines of an index, read one by one: it may be a stranger's, and shall not fill the memory."""
    try:
        if not file.is_file() or file.stat().st_size > largest:
            return
        with file.open("rb") as stream:
            while line := stream.readline(LONGEST):
                with suppress(ValueError, RecursionError):
                    if _is_line(found := json.loads(line)):
                        yield found
    except OSError:
        return


def _is_line(found: object) -> bool:
    if not isinstance(found, list) or len(found) != 4 or not isinstance(found[0], str):
        return False
    frames = found[3]
    return isinstance(frames, str) or (type(frames) is int and 0 < frames < MOST_FRAMES)


def _count_missing(root: Path, stamps: dict[str, Stamp], places: Sequence[Path]) -> dict[str, Entry]:
    """Open what no index knows, and write it down; one process does, the others of a training wait for it."""
    for place in places:
        try:
            turn = take_turn(place)
        except OSError:  # a folder that is read only, say
            continue
        with turn:
            return _count(root, stamps, _known(places, stamps), place)
    return _count(root, stamps, {}, None)


def _count(
    root: Path, stamps: dict[str, Stamp], known: dict[str, Entry], place: Path | None
) -> dict[str, Entry]:
    """`known` and all that was missing in it."""
    missing = [name for name in stamps if name not in known]
    with ThreadPoolExecutor(OPENERS) as pool, Progress(transient=True) as progress:
        bar = progress.add_task("frames of videos", total=len(missing))
        for first in range(0, len(missing), PART):
            part = missing[first : first + PART]
            for name, frames in zip(part, pool.map(_frames, [root / name for name in part])):
                known[name] = (*(stamps[name] or (0, 0)), frames)
                progress.advance(bar)
            if place is not None:
                _write(place / INDEX, known)
    return known


def _write(file: Path, known: dict[str, Entry]) -> None:
    try:
        write_file(file, "".join(json.dumps([name, *entry]) + "\n" for name, entry in known.items()))
    except OSError as error:
        warnings.warn(f"{file}: not written ({error.strerror}); frames will be counted again", stacklevel=2)


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _frames(file: Path) -> int | str:
    """Number of frames, or why the video cannot be read."""
    try:
        return frame_count(file)
    except UserError as error:
        return str(error).removeprefix(f"{file}: ")  # the folder may be moved
