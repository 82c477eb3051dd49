"""HDF5 files from others, read with h5py in a process of its own.

The library is written in C and trusts its files: of 1,500 damaged ones 3 kept it busy for ever, and others
ask for any amount of memory. A process can be limited: `read_hdf5` starts this module as a program.
"""

import json
import math
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from defi.errors import UserError, reading
from defi.instructions import read_instruction

# Seconds of computing: some at least, and more for larger files and for what unpacking them makes of them.
SECONDS, BYTES_PER_SECOND, UNPACKED_PER_SECOND = 3, 10**7, 10**8
MOST_PACKED = 1032  # bytes that deflate makes of one
MEMORY = 2**34  # bytes
FIX = "copy it again, or correct data.cameras"


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
    asked = {"file": str(path), "group": group, "cameras": dict(cameras), "text": text, "every": every}
    done = subprocess.run([sys.executable, "-m", "defi.data.hdf5", json.dumps(asked)], capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else said[-1]
        raise UserError(f"{path}: damaged, reading it does not end well ({how}); copy it again")
    found = pickle.loads(done.stdout)  # of this module's own making
    if isinstance(found, UserError):
        raise found
    return Episode(*found)


# ---------------------------------------------------------------- in the process


def _read(file: str, group: str, cameras: dict[str, str], text: str, every: int) -> tuple:
    try:
        import h5py
    except ImportError:
        raise UserError("data.source=hdf5: needs the package h5py; pip install h5py") from None
    size = Path(file).stat().st_size
    _limit(size)
    with h5py.File(file, "r") as content:
        episode = find(content, group)
        places = {camera: find(episode, place) for camera, place in cameras.items()}
        _limit(size, sum(place.nbytes for place in places.values() if isinstance(place, h5py.Dataset)))
        pictures = {camera: _pictures(place, every) for camera, place in places.items()}
        members = list(episode) if isinstance(episode, h5py.Group) else []
        return members, _text(episode, text) if text else None, pictures


def _limit(size: int, unpacked: int = 0) -> None:
    """Bounds on what this process may compute and hold.

    size: bytes of the file. unpacked: bytes of what is read from it, as the file says, which may be damaged.
    """
    believed = min(unpacked, MOST_PACKED * size, MEMORY)
    seconds = SECONDS + size // BYTES_PER_SECOND + believed // UNPACKED_PER_SECOND
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
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
            f"{group.file.filename}: {group.name} holds different {name}; give the path of one as data.text"
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


def _pictures(data: Any, every: int) -> np.ndarray | list[bytes]:
    """All raw pictures as one array, or each encoded one."""
    shape, dtype = getattr(data, "shape", None) or (), getattr(data, "dtype", None)
    if len(shape) == 4 and dtype == np.uint8 and shape[-1] == 3:
        return _rows(data, every)
    if len(shape) in (1, 2) and (dtype.kind in "OSV" or dtype.itemsize == 1):
        return [bytes(np.asarray(row)) for row in _rows(data, every)]
    raise UserError(
        f"{data.file.filename}: {data.name} is {dtype or 'a group'} {shape}, not pictures: "
        "uint8 [F, H, W, 3], or encoded ones; write them so (16 bits: >> 8; shares of 1: * 255)"
    )


def _rows(data: Any, every: int) -> np.ndarray:
    """Every `every`-th row. Each packed piece is read once; h5py's own steps take 4 to 30 times as long."""
    rows = np.empty((math.ceil(len(data) / every), *data.shape[1:]), data.dtype)
    packed = data.chunks[0] if data.chunks else 1
    for _, group in groupby(range(0, len(data), every), lambda row: row // packed):
        wanted = list(group)
        rows[wanted[0] // every : wanted[-1] // every + 1] = data[wanted[0] : wanted[-1] + 1][::every]
    return rows


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    try:
        with reading(asked["file"], FIX):
            found = _read(**asked)
    except UserError as error:
        found = error
    pickle.dump(found, sys.stdout.buffer, protocol=5)
