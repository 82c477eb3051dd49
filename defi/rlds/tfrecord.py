"""TFRecord files, and the `tf.train.Example` messages that RLDS keeps in them.

A file is a sequence of records, numbers little endian:

    uint64 length · uint32 checksum of the length · data · uint32 checksum of the data

The checksum is CRC-32C, rotated and shifted ("masked"). Of a message only the places of its values are
listed: a picture is decoded from its place, without its episode (the protocol-buffer libraries do not tell
places, and need compiled classes).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from jaxtyping import Float32, Int64

from defi.archive import Place
from defi.errors import UserError

HEADER, FOOTER = 12, 4  # bytes around a record's data
NOTHING, BYTES, FLOATS, INTS = 0, 1, 2, 3  # field numbers of tf.train.Feature's lists; it may hold none
# First bytes of files that are compressed as a whole.
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}


@dataclass(frozen=True)
class Record:
    """One record: its number in the file, the place of its data there, and the data."""

    number: int
    offset: int
    data: bytes


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[Record]:
    """All records of a file, checked.

    Raises:
        UserError: the file is missing, cut short, or a checksum is wrong; file and byte are named.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            number = 0
            while (start := file.tell()) < size:
                yield _read_record(path, file.read(HEADER), number, start, size, file.read)
                number += 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy the data set again") from None


def _read_record(path: Path, header: bytes, number: int, start: int, size: int, read) -> Record:
    where = f"{path}: record {number} at byte {start}"
    if len(header) < HEADER:
        raise UserError(f"{where} is cut short; copy the file again")
    length, crc = struct.unpack("<QI", header)
    if masked_crc(header[:8]) != crc:
        if number == 0 and (how := COMPRESSED.get(header[:2])):
            raise UserError(
                f"{path}: compressed with {how}, expected are plain records, to be read in place; unpack it "
                "under the same name"
            )
        raise UserError(f"{where}: wrong checksum of its length; copy the file again")
    if start + HEADER + length + FOOTER > size:
        raise UserError(f"{where} is cut short; copy the file again")
    data = read(length)
    if masked_crc(data) != struct.unpack("<I", read(FOOTER))[0]:
        raise UserError(f"{where}: wrong checksum of its {length} bytes of data; copy the file again")
    return Record(number, start + HEADER, data)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, Place]]:
    """Number, wire type and place of each field of a message; a varint's place includes all its bytes."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 2:
            length, at = _varint(data, at)
            after = at + length
        elif wire == 0:
            after = _varint(data, at)[1]
        elif wire in (1, 5):
            after = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if after > end:
            raise ValueError(f"a field that ends at byte {after} of {end}")
        yield tag >> 3, wire, (at, after)
        at = after


@dataclass(frozen=True)
class Values:
    """Values of one feature of an example: their kind (NOTHING, BYTES, FLOATS, INTS) and the list's place."""

    kind: int
    place: Place

    def bytes_places(self, data: bytes) -> list[Place]:
        """Places of the strings of a BYTES feature."""
        return [place for number, _, place in _fields(data, *self.place) if number == 1]

    def floats(self, data: bytes) -> Float32[np.ndarray, " N"]:
        """Of a FLOATS feature."""
        parts = [data[slice(*place)] for number, _, place in _fields(data, *self.place) if number == 1]
        return np.frombuffer(b"".join(parts), "<f4").astype(np.float32)

    def ints(self, data: bytes) -> Int64[np.ndarray, " N"]:
        """Of an INTS feature."""
        parts = [data[slice(*place)] for number, _, place in _fields(data, *self.place) if number == 1]
        return _varints(np.frombuffer(b"".join(parts), np.uint8))


def _varints(raw: np.ndarray) -> Int64[np.ndarray, " N"]:
    """Varints one after the other: seven bits per byte, lowest first, the top bit set on all but the last."""
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    values = np.zeros(len(ends), np.uint64)
    for byte in range(int(lengths.max(initial=0))):
        has = lengths > byte
        values[has] |= (raw[starts[has] + byte].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * byte)
    return values.view(np.int64)


def parse_example(data: bytes) -> dict[str, Values]:
    """Features of a `tf.train.Example`, by name; values stay where they are.

    Raises:
        ValueError: the bytes are no such message.
    """
    found = {}
    try:
        for number, _, features in _fields(data, 0, len(data)):
            for inner, _, entry in _fields(data, *features) if number == 1 else ():
                if inner == 1:
                    parts = {n: place for n, _, place in _fields(data, *entry)}
                    name = data[slice(*parts[1])].decode()
                    found[name] = Values(NOTHING, (0, 0))
                    for kind, _, place in _fields(data, *parts[2]) if 2 in parts else ():
                        found[name] = Values(kind, place)
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"not a tf.train.Example ({error!r})") from None
    return found
