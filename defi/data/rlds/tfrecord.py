"""TFRecord files, and the `tf.train.Example` messages that RLDS keeps in them.

A file is a sequence of records, numbers little endian:

    uint64 length · uint32 checksum of the length · data · uint32 checksum of the data

The checksum is CRC-32C, rotated and shifted ("masked"). Of a message only the places of its values are
listed: a picture is read from its place, without its episode (protocol-buffer libraries copy the values).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import google_crc32c
import numpy as np
from jaxtyping import Float32, Int64

from defi.archive import Place
from defi.errors import reading

FIX = "copy the file again"
HEADER, FOOTER = 12, 4  # bytes around a record's data
NOTHING, BYTES, FLOATS, INTS = 0, 1, 2, 3  # field numbers of tf.train.Feature's lists; it may hold none


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """All records of a file, checked: where each is, for errors; the first byte of its data, and the data."""
    with reading(path, FIX), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for number in count():
            if (start := file.tell()) == size:
                return
            where = f"{path}: record {number} at byte {start}"
            with reading(where, FIX):
                if (left := size - start - HEADER - FOOTER) < 0:
                    raise ValueError("truncated")
                header = file.read(HEADER)
                length, crc = struct.unpack("<QI", header)
                if masked_crc(header[:8]) != crc:
                    hint = "" if start else "; unpack it if it is compressed"
                    raise ValueError(f"wrong checksum of its length{hint}")
                if length > left:
                    raise ValueError("truncated")
                data = file.read(length)
                if masked_crc(data) != struct.unpack("<I", file.read(FOOTER))[0]:
                    raise ValueError(f"wrong checksum of its {length} bytes of data")
            yield where, start + HEADER, data


@dataclass(frozen=True)
class Values:
    """Values of one feature of an example: their kind (NOTHING, BYTES, FLOATS, INTS) and their places.

    A string has a place of its own; numbers are packed, most often all of them in one.
    """

    kind: int
    places: list[Place]

    def numbers(self, data: bytes) -> Float32[np.ndarray, " N"] | Int64[np.ndarray, " N"]:
        """Of a feature of FLOATS or INTS. Raises ValueError for BYTES."""
        if self.kind == BYTES:
            raise ValueError("it holds text")
        packed = b"".join(data[start:end] for start, end in self.places)
        if self.kind == FLOATS:
            return np.frombuffer(packed, "<f4").astype(np.float32)
        return _varints(np.frombuffer(packed, np.uint8))


def parse_example(data: bytes) -> dict[str, Values]:
    """Features of a `tf.train.Example`, by name; values stay where they are. Call it within `reading`."""
    found = {}
    for features in _places(data, (0, len(data)), 1):
        for entry in _places(data, features, 1):
            parts = dict(_fields(data, entry))
            lists = _fields(data, parts[2]) if 2 in parts else iter(())
            kind, values = next(lists, (NOTHING, (0, 0)))
            found[data[slice(*parts[1])].decode()] = Values(kind, _places(data, values, 1))
    return found


def _places(data: bytes, message: Place, number: int) -> list[Place]:
    """Places of a message's fields of one number."""
    return [place for found, place in _fields(data, message) if found == number]


def _fields(data: bytes, message: Place) -> Iterator[tuple[int, Place]]:
    """Number and place of each field of a message; a varint's place includes all its bytes."""
    at, end = message
    while at < end:
        tag, at = _varint(data, at)
        wire, after = tag & 7, at
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
        yield tag >> 3, (at, after)
        at = after


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits per byte, lowest first, the top bit set on all but the last; and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _varints(raw: np.ndarray) -> Int64[np.ndarray, " N"]:
    """Numbers one after the other, each as `_varint` reads it."""
    ends = np.flatnonzero(raw < 0x80) + 1
    starts = np.append(0, ends)[: len(ends)]
    values = np.zeros(len(ends), np.uint64)
    for byte in range(int((ends - starts).max(initial=0))):
        has = ends - starts > byte
        values[has] |= (raw[starts[has] + byte].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * byte)
    return values.view(np.int64)
