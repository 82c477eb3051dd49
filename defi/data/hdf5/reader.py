"""HDF5 files from others, read with h5py in a process of its own.

The library is written in C and trusts its files: of 1,500 damaged ones 3 kept it busy for ever, and others
ask for any amount of memory. A process can be limited, and may end. `ask` is for the process that trains.
"""

import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from defi.errors import UserError, reading
from defi.instructions import read_instruction

# Seconds of computing: some at least, and more for larger files and for what unpacking them makes of them.
SECONDS, BYTES_PER_SECOND, UNPACKED_PER_SECOND = 3, 10**7, 10**8
MOST_PACKED = 1032  # bytes that deflate makes of one
SMALL = 2**20  # bytes that any file may claim to hold
MEMORY = 2**34  # bytes
OPEN = 8  # files at the same time
MOST_MEMBERS = 1000  # that `tree` lists
FIX = "copy it again, or correct what data.cameras, data.actions and data.state name"


class Reader:
    """The process that reads for this one: started when it is first needed, and again after the library has
    complained: nobody knows what a damaged file has done to its memory. After a fork each has its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.pipe, other = Pipe()
        program = f"from defi.data.hdf5.reader import serve; serve({other.fileno()})"
        command = [sys.executable, "-c", program]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()])
        other.close()

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()
        self.process = None


READER = Reader()
os.register_at_fork(after_in_child=READER.__init__)


def ask(file: Path, what: str, *asked: Any) -> Any:
    """What the functions `tree`, `episodes` and `rows` say of a file.

    Raises:
        UserError: the file is damaged, or does not hold what is asked for.
    """
    with READER.lock:
        if READER.process and READER.process.poll() is not None:  # killed since it was last asked
            READER.end()
        if not READER.process:
            READER.start()
        try:
            READER.pipe.send((what, str(file), asked))
            found, sound = READER.pipe.recv()
        except (EOFError, OSError):
            code = READER.process.wait()
            READER.end()
            how = signal.Signals(-code).name if code < 0 else f"code {code}"
            raise UserError(f"{file}: damaged, reading it does not end well ({how}); copy it again") from None
        except BaseException:  # interrupted: what it still has to say belongs to nobody
            READER.end()
            raise
        if not sound:
            READER.end()
        if isinstance(found, UserError):
            raise found
        return found


# ---------------------------------------------------------------- in the process


def serve(descriptor: int) -> None:
    """Answer until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    pipe, functions, files = Connection(descriptor), {f.__name__: f for f in (tree, episodes, rows)}, {}
    while True:
        try:
            what, file, asked = pipe.recv()
        except EOFError:
            return
        try:
            with reading(file, FIX):
                _limit(os.stat(file).st_size)
                pipe.send((functions[what](_open(file, files), *asked), True))
        except UserError as fault:
            pipe.send((fault, fault.__cause__ is None))


def _open(file: str, files: dict[str, tuple[os.stat_result, Any]]) -> Any:
    """A file as h5py's; those that were asked for last stay open."""
    try:
        import h5py
    except ImportError:
        raise UserError("data.format=hdf5: needs the package h5py; pip install h5py") from None
    stat = os.stat(file)
    before, content = files.pop(file, (stat, None))
    if content and (before.st_size, before.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        content = content.close()
    files[file] = stat, content or h5py.File(file, "r", locking=False)
    if len(files) > OPEN:
        files.pop(next(iter(files)))[1].close()
    return files[file][1]


def tree(content: Any) -> dict[str, tuple[list[int], str]]:
    """Arrays of a file, at most `MOST_MEMBERS`: path → shape, type. Links are left alone."""
    found: dict[str, tuple[list[int], str]] = {}

    def note(path: str, member: Any) -> bool | None:
        if hasattr(member, "dtype"):
            found[path] = list(member.shape or ()), str(member.dtype)
        return True if len(found) >= MOST_MEMBERS else None

    content.visititems(note)
    return found


def episodes(content: Any, groups: str, *wanted: Sequence[str]) -> list[dict[str, Any]]:
    """What the episodes of a file are: the file itself (`groups` is ""), or the members of a group.

    Each is {"group": path, "fault": why it cannot be read, or ""} with the "shapes" of its pictures and
    numbers (paths within the episode), the "sum" of what the numbers are, and "text", the first of some
    `texts` that it says: a path of one or of an attribute, of the group, of one around it (the file itself
    at last), or of one in it.
    """
    if not groups:
        return [_episode(content, "", *wanted)]
    outer = find(content, groups)
    if not hasattr(outer, "visititems"):
        raise UserError(f"{content.filename}: {groups} is no group; correct data.groups")
    return [_episode(content, f"{groups.strip('/')}/{name}", *wanted) for name in outer]


def _episode(
    content: Any, group: str, pictures: Sequence[str], numbers: Sequence[str], texts: Sequence[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {"group": group, "fault": "", "shapes": {}, "text": "", "sum": 0}
    try:
        with reading(content.filename, FIX):
            episode = find(content, group)
            arrays = _arrays(episode, pictures, True) + _arrays(episode, numbers, False)
            found["shapes"] = {place: list(a.shape) for place, a in zip((*pictures, *numbers), arrays)}
            for array in arrays[len(pictures) :]:
                found["sum"] = zlib.crc32(array[()].tobytes(), found["sum"])
            found["text"] = next(filter(None, (_text(episode, name) for name in texts)), "")
    except UserError as error:
        found["fault"] = str(error)
    return found


def rows(content: Any, group: str, places: list[str], pictures: bool, positions: list[int]) -> list[Any]:
    """Rows of arrays within a group: of pictures uint8 [N, H, W, 3], or encoded ones, a list of bytes."""
    found = []
    for array in _arrays(find(content, group), places, pictures):
        if positions and not 0 <= min(positions) <= max(positions) < len(array):
            where = f"{content.filename}: {array.name} has {len(array)} rows"
            raise UserError(f"{where}, row {max(positions)} is asked for; {FIX}")
        some = _rows(array, positions)
        found.append([bytes(np.asarray(row)) for row in some] if pictures and some.ndim < 4 else some)
    return found


def _limit(size: int, unpacked: int = 0) -> None:
    """Bounds on what this process may compute from now on, and hold.

    size: bytes of the file. unpacked: bytes of what is read from it, as the file says, which may be damaged.
    """
    believed = min(unpacked, MOST_PACKED * size, MEMORY)
    seconds = SECONDS + size // BYTES_PER_SECOND + believed // UNPACKED_PER_SECOND
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    last = math.ceil(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (last if hard < 0 else min(last, hard), hard))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if soft == resource.RLIM_INFINITY else soft, hard))


def find(group: Any, path: str) -> Any:
    """A member of a file. Links that lead out of the file are not followed."""
    import h5py

    here = group.file.filename
    for name in filter(None, path.split("/")):
        if not isinstance(group, h5py.Group) or name not in group:
            members = ", ".join(group) if isinstance(group, h5py.Group) else "an array"
            raise UserError(f"{here}: has no {path}; {group.name} holds {members}")
        out = isinstance(group.get(name, getlink=True), h5py.ExternalLink)
        group = group if out else group[name]
        out |= group.file.filename != here  # by a link to a link
        out |= isinstance(group, h5py.Dataset) and bool(group.external or group.is_virtual)
        if out:
            raise UserError(f"{here}: {path} leads out of the file; this data set is not safe")
    return group


def _text(group: Any, name: str) -> str | None:
    """A text by its name: of the episode, of a group around it, or the only one within it."""
    place = group
    while not (text := _own_text(place, name)) and place.name != "/":
        place = place.parent
    within: set[str | None] = {text}
    if not text and hasattr(group, "visititems"):
        group.visititems(lambda _, member: within.add(_own_text(member, name)))  # links are left alone
    if len(within := within - {None}) > 1:
        what = f"{group.file.filename}: {group.name} holds different {name}"
        raise UserError(f"{what}; give the path of one as data.language")
    return next(iter(within), None)


def _own_text(place: Any, name: str) -> str | None:
    """What a path says, counted from a place: that of an attribute or a member; None if nothing."""
    folder, _, last = name.rpartition("/")
    try:
        owner = find(place, folder)
        value = owner.attrs[last] if last in owner.attrs else find(owner, last)[()]
    except (UserError, AttributeError, TypeError):  # there is nothing, or a group
        return None
    return read_instruction(value, f"{place.file.filename}: {name} of {place.name}") or None


def _arrays(episode: Any, places: Sequence[str], pictures: bool) -> list[Any]:
    """Members of an episode that hold what they should, and may be read: the limits make room for them."""
    found = [find(episode, place) for place in places]
    for data in found:
        shape, dtype = getattr(data, "shape", None) or (), getattr(data, "dtype", None)
        where = f"{data.file.filename}: {data.name} is {dtype or 'a group'} {shape}"
        raw = len(shape) == 4 and dtype == np.uint8 and shape[-1] == 3
        flat = len(shape) in (1, 2)
        if pictures and not raw and not (flat and (dtype.kind in "OSV" or dtype.itemsize == 1)):
            fix = "write them so (16 bits: >> 8; shares of 1: * 255)"
            raise UserError(f"{where}, not pictures: uint8 [F, H, W, 3], or encoded ones; {fix}")
        if not pictures and not (flat and dtype.kind in "fiub"):
            raise UserError(f"{where}, not numbers [F] or [F, A]; correct data.actions, data.state")
        if data.nbytes > max(SMALL, MOST_PACKED * os.stat(data.file.filename).st_size):
            raise UserError(f"{where}: more than a file of its size can hold; copy it again")
    if found:
        _limit(os.stat(found[0].file.filename).st_size, sum(array.nbytes for array in found))
    return found


def _rows(data: Any, positions: list[int]) -> np.ndarray:
    """Rows in any order. Each packed piece is read once; h5py's own ways take 4 to 30 times as long."""
    wanted, places = np.unique(np.array(positions, np.int64), return_inverse=True)
    pieces = wanted // (data.chunks[0] if data.chunks else 1)
    breaks = np.flatnonzero((np.diff(pieces) > 0) & (np.diff(wanted) > 1)) + 1
    parts = [data[part[0] : part[-1] + 1][part - part[0]] for part in np.split(wanted, breaks)]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts))[places]
