"""Files of a folder, or of a `.zip` that is not unpacked: 500 GB need not lie on the disk twice."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from defi.errors import UserError, reading

Place = tuple[int, int]  # first byte and the one after the last
COPY_AGAIN = "copy the data set again"
LARGEST = 2**30  # bytes of one file; those of a data set in a zip are far smaller
LOCAL_HEADER = 30  # bytes before a member's name; the last four are the lengths of name and extra field


def open_files(folder: Path) -> "FolderFiles | ZipFiles":
    """Files below a folder, or below a folder within a zip (`data.zip/training`), at any depth in it.

    Raises UserError: there is no such folder, or the zip is damaged.
    """
    for archive in (folder, *folder.parents):
        if archive.suffix.lower() == ".zip" and archive.is_file():
            return ZipFiles(archive, folder.relative_to(archive).as_posix())
    if not folder.is_dir():
        hint = "give a data set in CALVIN's format, or collect one: python -m defi.sim.collect"
        raise UserError(f"{folder}: no such folder; {hint}")
    return FolderFiles(folder)


@dataclass
class FolderFiles:
    """Files by their names below a folder; iterating yields the names of those directly in it."""

    folder: Path

    def path(self, name: str) -> Path:
        """Where the file lies, for messages."""
        return self.folder / name

    def open(self, name: str) -> Path | BinaryIO:
        """What `zipfile` and the like can read from."""
        return self.path(name)

    def read(self, name: str) -> bytes:
        with reading(self.path(name), COPY_AGAIN):
            return self.path(name).read_bytes()

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file()

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in os.scandir(self.folder))


class ZipFiles:
    """As `FolderFiles`: members of a zip below the shallowest folder whose path ends with `folder`.

    `zipfile` reads the directory. Its objects are not kept: those of a million members take 550 MB in every
    process, and its readers share one position in the file with forked ones. Sorted arrays take 90 MB.
    """

    def __init__(self, archive: Path, folder: str) -> None:
        self.archive = archive
        with reading(archive, "copy it again"):
            with zipfile.ZipFile(archive) as file:
                members = file.infolist()
            if min((member.header_offset for member in members), default=1) > 0:  # of an .npz in it, say
                raise ValueError("its directory at the end is missing")
        ends = ((m.filename, f"/{m.filename}".find(f"/{folder}/")) for m in members)
        prefixes = {name[: at + len(folder) + 1] for name, at in ends if at >= 0} if folder != "." else {""}
        if not prefixes:
            raise UserError(f"{archive}: no folder {folder} in it; check the path")
        self.prefix = min(prefixes, key=lambda prefix: (prefix.count("/"), prefix))
        inside = [m for m in members if m.filename.startswith(self.prefix) and not m.is_dir()]
        names = np.array([m.filename[len(self.prefix) :].encode() for m in inside], dtype=bytes)
        numbers = [(m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC) for m in inside]
        order = np.argsort(names, kind="stable")
        self._names = names[order]
        self._members: Int64[np.ndarray, "N 5"] = np.array(numbers, np.int64).reshape(-1, 5)[order]

    def path(self, name: str) -> Path:
        return self.archive / f"{self.prefix}{name}"

    def open(self, name: str) -> Path | BinaryIO:
        return io.BytesIO(self.read(name))

    def __contains__(self, name: str) -> bool:
        at = np.searchsorted(self._names, name.encode())
        return self._names[at : at + 1].tolist() == [name.encode()]

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self._names if b"/" not in name)

    def read(self, name: str) -> bytes:
        if name not in self:
            raise UserError(f"{self.path(name)}: missing in the zip; {COPY_AGAIN}")
        at = np.searchsorted(self._names, name.encode())
        offset, packed_size, size, method, crc = self._members[at].tolist()
        (header,) = read_places(self.archive, [(offset, offset + LOCAL_HEADER)])
        start = offset + LOCAL_HEADER + sum(struct.unpack("<2H", header[-4:]))
        (data,) = read_places(self.archive, [(start, start + packed_size)])
        with reading(f"{self.archive}/{self.prefix}{name}, at byte {start} of the zip", COPY_AGAIN):
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or size > LARGEST:
                raise ValueError(f"compression method {method}, {size:,} bytes")
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(1, size))
            if len(data) != size or zlib.crc32(data) != crc:
                raise ValueError("wrong checksum")
            return data


def read_places(path: Path, places: Sequence[Place]) -> list[bytes]:
    """Some bytes of a file; safe in any number of threads and processes."""
    with reading(path, "copy it again"):
        descriptor = os.open(path, os.O_RDONLY)  # half the time of `open`
        try:
            size = os.fstat(descriptor).st_size  # a damaged place may ask for more memory than there is
            for start, end in places:
                if not 0 <= start <= end <= size:
                    raise ValueError(f"it has no bytes {start} to {end}")
            return [os.pread(descriptor, end - start, start) for start, end in places]
        finally:
            os.close(descriptor)
