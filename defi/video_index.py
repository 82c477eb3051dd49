"""How many frames the videos of a folder have: counted once, so that a later start opens none of them.

    <root>/.defi/frames.json   {path below root: [bytes, time of change in ns, frames, or why there are none]}

Where the folder cannot be written to, the file lies in the user's cache. A video is opened again when its
size or time of change is another one.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import Progress

from defi.cache import take_turn, user_cache
from defi.engine.output import write_file
from defi.errors import UserError
from defi.files import read_json
from defi.video import frame_count

INDEX = "frames.json"
OPENERS = 8  # videos that are opened at the same time
PART = 2000  # videos after which the index is written, should the counting be interrupted
MOST_FRAMES = 10**9

Entry = tuple[int, int, int | str]  # bytes, time of change in ns, frames or the fault
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
        try:
            written = read_json(place / INDEX, "")
        except UserError:
            continue
        for name, stamp in stamps.items():
            if stamp and _is_entry(entry := written.get(name)) and stamp == tuple(entry[:2]):
                known[name] = tuple(entry)
    return known


def _is_entry(entry: object) -> bool:
    """Whether it says what an index says; the folder, and the index in it, may be a stranger's."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    frames = entry[2]
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
        write_file(file, json.dumps(known))
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
