"""HDF5 files from others, read with h5py in a process of its own.

The library is written in C and trusts its files: of 1,500 damaged ones 3 kept it busy for ever, and others
ask for any amount of memory. A process can be limited. This module is both ends: `HDF5Reader` starts it as a
program, asks it with a line of JSON, and gets a line of JSON and the bytes of arrays; nothing is unpickled.
"""

import atexit
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from defi.errors import UserError, reading
from defi.instructions import read_instruction

# Seconds of computing: some at least, and more for larger files and for what unpacking them makes of them.
SECONDS, BYTES_PER_SECOND, UNPACKED_PER_SECOND = 3, 10**7, 10**8
MOST_PACKED = 1032  # bytes that deflate makes of one
MEMORY = 2**34  # bytes
OPEN = 8  # files at the same time
CHUNKS = 2**25  # bytes of unpacked pieces that are kept of each array
MOST_MEMBERS = 1000  # that `tree` lists
FIX = "copy it again, or correct what data.cameras, data.actions and data.state name"

Rows = np.ndarray | list[bytes]


class HDF5Reader:
    """Asks the process that reads; it is started when it is first needed, and again after a damaged file.

    Usable from several threads, and after a fork: each process has a reader of its own.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def tree(self, path: Path) -> dict[str, tuple[list[int], str]]:
        """Arrays of a file, at most `MOST_MEMBERS`: path → shape, type. Links are left alone."""
        return self._ask(path, "tree")[0]

    def episodes(
        self, path: Path, groups: str, pictures: Sequence[str], numbers: Sequence[str], texts: Sequence[str]
    ) -> list[dict[str, Any]]:
        """What the episodes of a file are: the file itself (`groups` is ""), or the members of a group.

        Each is {"group": path, "fault": why it cannot be read, or ""} with "shapes", those of its pictures
        and numbers (paths within the episode), and "text", the first of `texts` that it says. A text is a
        path of one or of an attribute: of the group, one around it (the file itself at last), or one in it.
        """
        places = {"pictures": list(pictures), "numbers": list(numbers), "texts": list(texts)}
        return self._ask(path, "episodes", groups=groups, **places)[0]

    def pictures(self, path: Path, group: str, places: Sequence[str], positions: Sequence[int]) -> list[Rows]:
        """Rows of pictures (paths within the group): uint8 [N, H, W, 3], or the bytes of encoded ones."""
        found = self._ask(path, "rows", group=group, pictures=list(places), positions=[*map(int, positions)])[
            1
        ]
        return [[r.tobytes() for r in rows] if getattr(rows, "ndim", 4) < 4 else rows for rows in found]

    def numbers(
        self, path: Path, group: str, places: Sequence[str], positions: Sequence[int]
    ) -> Float32[np.ndarray, "N A"]:
        """Rows of numbers (paths within the group), joined."""
        found = self._ask(path, "rows", group=group, numbers=list(places), positions=[*map(int, positions)])[
            1
        ]
        return np.concatenate([rows.reshape(len(rows), -1).astype(np.float32) for rows in found], axis=1)

    def _ask(self, path: Path, what: str, **asked: Any) -> tuple[Any, list[Rows]]:
        with self._lock:
            process = self._process or self._start()
            try:
                process.stdin.write(json.dumps({"what": what, "file": str(path), **asked}).encode() + b"\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                found = [_receive(process.stdout, kind) for kind in answer["arrays"]]
            except (OSError, ValueError, EOFError):  # it has ended, or will not make sense again
                process.kill()
                said = process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
                code = process.wait()
                self.close()
                how = (
                    signal.Signals(-code).name if code < 0 and not said else " ".join(said) or f"code {code}"
                )
                fault = f"{path}: damaged, reading it does not end well ({how}); copy it again"
                raise UserError(fault) from None
            except BaseException:  # interrupted: what it still has to say belongs to nobody
                self.close()
                raise
            if answer["error"]:
                self.close()  # what a damaged file has done to the library's memory, nobody knows
                raise UserError(answer["error"])
            return answer["value"], found

    def _start(self) -> subprocess.Popen:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", "defi.hdf5"], stdin=pipe, stdout=pipe, stderr=pipe
        )
        return self._process

    def close(self) -> None:
        """End the process, if there is one."""
        if process := self._process:
            self._process = None
            process.kill()
            process.wait()
            self._let_go(process)

    def forget(self) -> None:
        """After a fork: the process is the parent's."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process:
            process.returncode = 0  # not ours to wait for
            self._let_go(process)

    def _let_go(self, process: subprocess.Popen) -> None:
        for pipe in (process.stdin, process.stdout, process.stderr):
            try:
                pipe.close()
            except OSError:  # what was left to write has no reader
                pass


def _receive(pipe: Any, kind: Sequence[Any]) -> Rows:
    """An array of type and shape; or as many encoded pictures as there are lengths."""
    dtype, shape = kind
    buffer = np.empty(sum(shape) if dtype == "bytes" else shape, np.uint8 if dtype == "bytes" else dtype)
    if buffer.nbytes > MEMORY or pipe.readinto(memoryview(buffer).cast("B")) < buffer.nbytes:
        raise EOFError
    if dtype != "bytes":
        return buffer
    ends = np.cumsum([0, *shape])
    return [buffer[start:end].tobytes() for start, end in zip(ends, ends[1:])]


READER = HDF5Reader()
os.register_at_fork(after_in_child=READER.forget)
atexit.register(READER.close)


# ---------------------------------------------------------------- in the process


class Files:
    """The files that were asked for last, open."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[tuple[int, int], Any]] = {}

    def open(self, file: str) -> Any:
        try:
            import h5py
        except ImportError:
            raise UserError("data.format=hdf5: needs the package h5py; pip install h5py") from None
        stat = os.stat(file)
        state = stat.st_size, stat.st_mtime_ns
        before, content = self._open.pop(file, (None, None))
        if before != state:
            if content is not None:
                content.close()
            content = h5py.File(file, "r", locking=False, rdcc_nbytes=CHUNKS)
        self._open[file] = state, content
        if len(self._open) > OPEN:
            self._open.pop(next(iter(self._open)))[1].close()
        return content


def tree(content: Any) -> dict[str, tuple[list[int], str]]:
    found: dict[str, tuple[list[int], str]] = {}

    def note(path: str, member: Any) -> bool | None:
        if hasattr(member, "dtype"):
            found[path] = list(member.shape or ()), str(member.dtype)
        return True if len(found) >= MOST_MEMBERS else None

    content.visititems(note)
    return found


def episodes(content: Any, groups: str, **wanted: list[str]) -> list[dict[str, Any]]:
    if not groups:
        return [_episode(content, "", **wanted)]
    outer = find(content, groups)
    if not hasattr(outer, "visititems"):
        raise UserError(f"{content.filename}: {groups} is no group; correct data.groups")
    return [_episode(content, f"{groups.strip('/')}/{name}", **wanted) for name in outer]


def _episode(
    content: Any, group: str, pictures: list[str], numbers: list[str], texts: list[str]
) -> dict[str, Any]:
    try:
        with reading(content.filename, FIX):
            episode = find(content, group)
            shapes = {place: list(_arrays(episode, [place], True)[0].shape) for place in pictures}
            shapes |= {place: list(_arrays(episode, [place], False)[0].shape) for place in numbers}
            text = next(filter(None, (_text(episode, name) for name in texts)), "")
            return {"group": group, "fault": "", "shapes": shapes, "text": text}
    except UserError as error:
        return {"group": group, "fault": str(error), "shapes": {}, "text": ""}


def rows(
    content: Any, group: str, positions: list[int], pictures: Sequence[str] = (), numbers: Sequence[str] = ()
) -> list[Rows]:
    episode = find(content, group)
    arrays = _arrays(episode, pictures, True) + _arrays(episode, numbers, False)
    for array in arrays:
        if positions and not 0 <= min(positions) <= max(positions) < len(array):
            where = f"{content.filename}: {array.name}"
            raise UserError(f"{where} has {len(array)} rows, row {max(positions)} is asked for; {FIX}")
    _limit(os.stat(content.filename).st_size, sum(array.nbytes for array in arrays))
    return [_rows(array, positions) for array in arrays]


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
        raise UserError(
            f"{group.file.filename}: {group.name} holds different {name}; "
            "give the path of one as data.language"
        )
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
    """Members of an episode that hold what they should."""
    found = [find(episode, place) for place in places]
    for data in found:
        shape, dtype = getattr(data, "shape", None) or (), getattr(data, "dtype", None)
        raw = len(shape) == 4 and dtype == np.uint8 and shape[-1] == 3
        flat = len(shape) in (1, 2)
        if pictures and not raw and not (flat and (dtype.kind in "OSV" or dtype.itemsize == 1)):
            raise UserError(
                f"{data.file.filename}: {data.name} is {dtype or 'a group'} {shape}, not pictures: "
                "uint8 [F, H, W, 3], or encoded ones; write them so (16 bits: >> 8; shares of 1: * 255)"
            )
        if not pictures and not (flat and dtype.kind in "fiub"):
            what = f"{dtype or 'a group'} {shape}, not numbers [F] or [F, A]"
            raise UserError(f"{data.file.filename}: {data.name} is {what}; correct data.actions, data.state")
    return found


def _rows(data: Any, positions: list[int]) -> Rows:
    """Rows in any order. Each packed piece is read once; h5py's own ways take 4 to 30 times as long."""
    wanted, places = np.unique(positions, return_inverse=True)
    pieces = wanted // (data.chunks[0] if data.chunks else 1)
    breaks = np.flatnonzero((np.diff(pieces) > 0) & (np.diff(wanted) > 1)) + 1
    parts = [data[part[0] : part[-1] + 1][part - part[0]] for part in np.split(wanted, breaks)]
    found = (parts[0] if len(parts) == 1 else np.concatenate(parts))[places]
    return [bytes(np.asarray(row)) for row in found] if found.dtype.kind in "OSV" else found


def answer(asked: dict[str, Any], files: Files) -> tuple[Any, list[Rows]]:
    """The value and the arrays that a request asks for."""
    what, file = asked.pop("what"), asked.pop("file")
    with reading(file, FIX):
        _limit(os.stat(file).st_size)
        content = files.open(file)
        if what == "rows":
            return None, rows(content, **asked)
        return (tree(content) if what == "tree" else episodes(content, **asked)), []


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; this one ends with it
    files, out = Files(), sys.stdout.buffer
    for line in sys.stdin.buffer:
        value, arrays, error = None, [], ""
        try:
            value, arrays = answer(json.loads(line), files)
        except UserError as fault:
            error = str(fault)
        kinds = [("bytes", [*map(len, a)]) if isinstance(a, list) else (a.dtype.str, a.shape) for a in arrays]
        out.write(json.dumps({"error": error, "value": value, "arrays": kinds}).encode() + b"\n")
        for array in arrays:
            out.write(
                b"".join(array) if isinstance(array, list) else np.ascontiguousarray(array).data.cast("B")
            )
        out.flush()


if __name__ == "__main__":
    main()
