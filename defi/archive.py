"""Files of a folder, or of a `.zip` that is not unpacked: 500 GB need not lie on the disk twice."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from defi.errors import UserError

Place = tuple[int, int]  # first byte and the one after the last
LARGEST = 2**30  # bytes of one file; those of a data set in a zip are far smaller
LOCAL_HEADER = (
    30  # bytes before a member's name; its last two numbers are the lengths of name and extra field
)


class Files(Protocol):
    """Files by their names below some folder."""

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises UserError if it is missing or damaged."""
        ...

    def path(self, name: str) -> Path:
        """Where the file lies, for messages."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def __iter__(self) -> Iterator[str]:
        """Names of the files directly in the folder."""
        ...


def open_files(folder: Path) -> Files:
    """Files below a folder, or below a folder within a zip (`data.zip/training`), at any depth in it.

    Raises:
        UserError: there is no such folder, or the zip is cut short.
    """
    for archive in (folder, *folder.parents):
        if archive.suffix.lower() == ".zip" and archive.is_file():
            return ZipFiles(archive, folder.relative_to(archive).as_posix())
    return FolderFiles(folder)


class FolderFiles:
    """Files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.path(name)}: missing; copy the data set again") from None
        except OSError as error:
            raise UserError(f"{self.path(name)}: cannot be read ({error.strerror}); check the disk") from None

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file()

    def __iter__(self) -> Iterator[str]:
        with os.scandir(self.folder) as entries:
            yield from (entry.name for entry in entries)


class ZipFiles:
    """Members of a zip below the shallowest folder whose path ends with `folder`.

    Millions of members are kept as one sorted string array and an array of places, not as objects.
    """

    def __init__(self, archive: Path, folder: str) -> None:
        self.archive = archive
        try:
            with zipfile.ZipFile(archive) as file:
                members = file.infolist()
            if min((member.header_offset for member in members), default=1) > 0:
                # the directory that was found is that of a zip within this one: an .npz, say
                raise ValueError("its directory at the end is missing")
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise UserError(f"{archive}: cut short or damaged ({error}); copy it again") from None
        self.prefix = _prefix((member.filename for member in members), folder)
        if self.prefix is None:
            raise UserError(f"{archive}: no folder {folder} in it; check the path")
        inside = sorted(
            (
                m.filename.removeprefix(self.prefix),
                m.header_offset,
                m.compress_size,
                m.file_size,
                m.compress_type,
                m.CRC,
            )
            for m in members
            if m.filename.startswith(self.prefix) and not m.is_dir()
        )
        self._names = np.array([name.encode() for name, *_ in inside], dtype=bytes)
        self._members: Int64[np.ndarray, "N 5"] = np.array([m[1:] for m in inside], np.int64).reshape(-1, 5)

    def path(self, name: str) -> Path:
        return self.archive / f"{self.prefix}{name}"

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self._names if b"/" not in name)

    def _find(self, name: str) -> int | None:
        at = int(np.searchsorted(self._names, name.encode()))
        return at if at < len(self._names) and self._names[at] == name.encode() else None

    def read(self, name: str) -> bytes:
        found = self._find(name)
        if found is None:
            raise UserError(f"{self.path(name)}: missing in the zip; copy the data set again")
        offset, size, whole, method, crc = (int(n) for n in self._members[found])
        (header,) = read_places(self.archive, [(offset, offset + LOCAL_HEADER)])
        start = offset + LOCAL_HEADER + sum(struct.unpack("<2H", header[-4:]))
        (data,) = read_places(self.archive, [(start, start + size)])
        try:
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"compression method {method}")
            if whole > LARGEST:
                raise ValueError(f"{whole:,} bytes")
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(1, whole))
            if len(data) != whole or zlib.crc32(data) != crc:
                raise ValueError("wrong checksum")
        except (zlib.error, ValueError) as error:
            where = f"{self.path(name)}, at byte {start} of the zip"
            raise UserError(f"{where}: damaged ({error}); copy it again") from None
        return data


def _prefix(names: Iterator[str], folder: str) -> str | None:
    """Path of the shallowest folder that ends with `folder` ("." is the zip's root), with a slash."""
    if folder == ".":
        return ""
    found = set()
    for name in names:
        place = f"/{name}".find(f"/{folder}/")
        if place >= 0:
            found.add(name[: place + len(folder) + 1])
    return min(found, key=lambda prefix: (prefix.count("/"), prefix), default=None)


def read_places(path: Path, places: Sequence[Place]) -> list[bytes]:
    """Some bytes of a file; safe in any number of threads and processes.

    Raises:
        UserError: the file is missing or shorter than that.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size  # a damaged place may ask for more memory than there is
            parts = []
            for start, end in places:
                whole = 0 <= start <= end <= size
                part = os.pread(descriptor, end - start, start) if whole else b""
                if not whole or len(part) != end - start:
                    raise UserError(f"{path}: has no bytes {start} to {end}; copy it again")
                parts.append(part)
            return parts
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
