"""HDF5 files of strangers, read in a process of its own.

The library is written in C and trusts its files: one damaged in the wrong place keeps it busy for ever, or
makes it ask for any amount of memory. In a process of its own it has an end: `read_hdf5` starts this module
as a program, which leaves what was asked for on its standard output. Needs the package h5py.
"""

import contextlib
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defi.errors import UserError
from defi.instructions import read_instruction

if TYPE_CHECKING:
    import h5py

# Seconds of computing: some at least, and more for larger files and for what unpacking them makes of them.
SECONDS, BYTES_PER_SECOND, UNPACKED_PER_SECOND = 3, 10**7, 10**8
MOST_PACKED = 1032  # bytes that deflate makes of one
MEMORY = 2**34  # bytes
TOLD = 2  # exit code where standard error ends with a message for the user


@dataclass(frozen=True)
class Episode:
    """One group of a file. members: names of its members. text: what it says, None if nothing.

    pictures: camera -> uint8 [F, H, W, 3], or one encoded picture per row.
    """

    members: list[str]
    text: str | None
    pictures: dict[str, np.ndarray | list[bytes]]


def read_hdf5(path: Path, *, group: str = "", cameras: Mapping[str, str], text: str, every: int) -> Episode:
    """Every `every`-th picture of some cameras (name -> path within the group), and a text.

    text: path of a text or an attribute: of the group, one around it (the file itself at last), or one in it.

    Raises:
        UserError: the file is damaged, has no such members, or they are not what they should be.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    asked = {"path": str(path), "group": group, "cameras": dict(cameras), "text": text, "every": every}
    command = [sys.executable, "-m", "defi.hdf5", json.dumps(asked | {"size": size})]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode == TOLD:
            raise UserError(said[-1])
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else said[-1]
        raise UserError(f"{path}: damaged, reading it comes to no good end ({how}); copy it again")
    header, _, rest = done.stdout.partition(b"\n")
    found = json.loads(header)
    pictures, start = {}, 0
    for camera, shapes in found["pictures"].items():
        parts = []
        for shape in shapes:
            size = int(np.prod(shape))
            parts.append(np.frombuffer(rest, np.uint8, size, start).reshape(shape).copy())
            start += size
        raw = len(shapes) == 1 and len(shapes[0]) == 4
        pictures[camera] = parts[0] if raw else [part.tobytes() for part in parts]
    return Episode(found["members"], found["text"], pictures)


# ---------------------------------------------------------------- in the process


@contextlib.contextmanager
def opened(path: str) -> Iterator["h5py.File"]:
    """A file to read from; what is wrong with it is a UserError."""
    try:
        import h5py
    except ImportError:
        raise UserError("data.source=hdf5: needs the package h5py; pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, or not as data.cameras says ({reason}); copy it again") from None


def find(group: "h5py.Group", path: str) -> Any:
    """A member of a file. Links that lead out of the file are not followed.

    Raises:
        UserError: there is no such member, or it lies in another file.
    """
    import h5py

    here = group.file.filename
    for name in filter(None, path.split("/")):
        if not isinstance(group, h5py.Group) or name not in group:
            raise UserError(f"{here}: has no {path}; {group.name} holds {_members(group)}")
        out = isinstance(group.get(name, getlink=True), h5py.ExternalLink)
        group = group if out else group[name]
        out |= group.file.filename != here  # by a link to a link
        out |= isinstance(group, h5py.Dataset) and bool(group.external or group.is_virtual)
        if out:
            raise UserError(f"{here}: {path} leads out of the file; this data set is not safe")
    return group


def _members(group: Any) -> str:
    return ", ".join(group.keys()) if hasattr(group, "keys") else "an array"


def _text(group: Any, name: str) -> str | None:
    """A text by its name: of the episode, of a group around it, or of one within it.

    Raises:
        UserError: what has this name is no text, or there are different ones within.
    """
    places = [group]
    while places[-1].name != "/":
        places.append(places[-1].parent)
    if text := next(filter(None, (_own_text(place, name) for place in places)), None):
        return text
    within: set[str | None] = set()
    if hasattr(group, "visititems"):
        group.visititems(lambda _, member: within.add(_own_text(member, name)))  # links are left alone
    if len(within := within - {None}) > 1:
        raise UserError(
            f"{group.file.filename}: {group.name} holds different {name}; give the path of one as data.text"
        )
    return next(iter(within), None)


def _own_text(place: Any, name: str) -> str | None:
    """What a path says, counted from a place: that of an attribute or a member; None if nothing."""
    folder, _, last = name.rpartition("/")
    try:
        owner = find(place, folder)
    except UserError:
        return None
    value = owner.attrs.get(last)
    if value is None and hasattr(owner, "keys") and last in owner:
        member = find(owner, last)
        value = member[()] if hasattr(member, "shape") else None
    if value is None:
        return None
    return read_instruction(value, f"{place.file.filename}: {name} of {place.name}") or None


def _pictures(data: Any, every: int) -> list[np.ndarray]:
    """All raw pictures as one array, or each encoded one."""
    if getattr(data, "ndim", 0) == 4 and data.dtype == np.uint8 and data.shape[-1] == 3:
        return [_rows(data, every)]
    if getattr(data, "ndim", 0) in (1, 2) and (data.dtype.kind in "OSV" or data.dtype.itemsize == 1):
        return [np.frombuffer(bytes(np.asarray(row)), np.uint8) for row in _rows(data, every)]
    what = f"{data.dtype} {data.shape}" if hasattr(data, "shape") else "a group"
    raise UserError(
        f"{data.file.filename}: {data.name} is {what}, not pictures: uint8 [F, H, W, 3], or encoded ones; "
        "write them so (16 bits: >> 8; shares of 1: * 255)"
    )


def _rows(data: "h5py.Dataset", every: int) -> np.ndarray:
    """Every `every`-th row. Each packed piece of the file is read once: HDF5 itself is slow at steps."""
    rows = np.empty((-(-len(data) // every), *data.shape[1:]), data.dtype)
    packed = data.chunks[0] if data.chunks else 1
    for _, group in groupby(range(0, len(data), every), lambda row: row // packed):
        wanted = list(group)
        rows[wanted[0] // every : wanted[-1] // every + 1] = data[wanted[0] : wanted[-1] + 1][::every]
    return rows


def _unpacked(member: Any) -> int:
    """Bytes that a data set says it holds; zero of a group."""
    return math.prod(member.shape or ()) * member.dtype.itemsize if hasattr(member, "shape") else 0


def _limit(size: int, unpacked: int = 0) -> None:
    """Bounds on what this process may compute and hold.

    size: bytes of the file. unpacked: bytes of what is read from it, as the file says, which may be damaged.
    """
    believed = min(unpacked, MOST_PACKED * size, MEMORY)
    seconds = SECONDS + size // BYTES_PER_SECOND + believed // UNPACKED_PER_SECOND
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if soft == resource.RLIM_INFINITY else soft, hard))


def main() -> None:
    """Write what was asked for: a line of JSON, then the bytes of all pictures."""
    asked = json.loads(sys.argv[1])
    try:
        with opened(asked["path"]) as file:
            _limit(asked["size"])
            group = find(file, asked["group"])
            places = {camera: find(group, place) for camera, place in asked["cameras"].items()}
            _limit(asked["size"], sum(map(_unpacked, places.values())))
            found = {camera: _pictures(place, asked["every"]) for camera, place in places.items()}
            text = _text(group, asked["text"]) if asked["text"] else None
            members = list(group) if hasattr(group, "keys") else []
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(TOLD)
    shapes = {camera: [part.shape for part in parts] for camera, parts in found.items()}
    header = json.dumps({"members": members, "text": text, "pictures": shapes})
    sys.stdout.buffer.write(header.encode() + b"\n")
    for parts in found.values():
        for part in parts:
            sys.stdout.buffer.write(np.ascontiguousarray(part).data)


if __name__ == "__main__":
    main()
