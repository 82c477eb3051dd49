"""NumPy's `.npy` files from others: plain arrays, and the pickled dictionaries that CALVIN keeps in them.

`numpy.load(allow_pickle=True)` calls whatever the pickle names. Here it may name only NumPy's constructors,
and stand-ins record their arguments: NumPy itself would trust a pickled type or shape. Arrays are then made
by `numpy.frombuffer` from checked types and sizes.
"""

import io
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from defi.errors import reading
from defi.files import PlainUnpickler

FIX = "copy or write it again"
NUMERIC = frozenset("biufcSU")
GLOBALS = re.compile(r"numpy\.(ndarray|dtype|_?core\.multiarray\.(_reconstruct|scalar))|_codecs\.encode")
SPARE_VALUES = 100_000  # that a pickle may repeat, besides one for each of its bytes
PARSER = threading.Lock()  # of headers: with `ast`, whose depth count Python 3.11 shares among threads


class _Recorded:
    """Stands for a global of NumPy, or for a call of it. state: what the pickle sets afterwards.

    array: made of it, once, however often it is referred to.
    """

    array: np.ndarray | None = None

    def __init__(self, name: str, args: tuple = ()) -> None:
        self.name, self.args, self.state = name, args, ()

    def __call__(self, *args: Any) -> Any:
        if self.name == "encode" and args[1:] == ("latin1",):  # how protocol 2 spells bytes
            return args[0].encode("latin1")
        return _Recorded(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(PlainUnpickler):
    def find_class(self, module: str, name: str) -> _Recorded:
        known = GLOBALS.fullmatch(f"{module}.{name}")
        return _Recorded(name) if known else super().find_class(module, name)


def _plain(value: Any, left: Iterator) -> Any:
    """The plain value of what was unpickled. left: yields once per value that it may have."""
    if next(left, None) is None:  # a shared list can stand for any number of values
        raise ValueError("it repeats its values too often")
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if type(value) is dict:
        return {_plain(key, left): _plain(item, left) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_plain(item, left) for item in value)
    name = value.name if type(value) is _Recorded else f"a {type(value).__name__}"
    if name == "scalar":
        dtype, data = value.args
        return np.frombuffer(data, _numeric_type(dtype)).reshape(())[()]
    if name != "_reconstruct":
        raise ValueError(f"it holds {name}, which is not plain data")
    if value.array is not None:
        return value.array
    _, shape, dtype, fortran, data = value.state
    if dtype.name == "dtype" and dtype.args[0] in ("O", "O8") and type(data) is list:
        flat = np.empty(len(data), object)
        for place, item in enumerate(data):
            flat[place] = _plain(item, left)
    else:
        flat = np.frombuffer(data, stored := _numeric_type(dtype)).astype(stored.newbyteorder("="))
    if math.prod(shape) != flat.size:
        raise ValueError("the size and contents of an array differ")
    value.array = flat.reshape(shape, order="F" if fortran else "C")
    return value.array


def _numeric_type(record: Any) -> np.dtype:
    if record.name != "dtype" or not re.fullmatch("[biufcSU][0-9]+", record.args[0]):
        raise ValueError(f"it holds arrays of type {record.args[0]!r}")
    return np.dtype(record.args[0]).newbyteorder(record.state[1] if record.state else "|")


def load_npy(path: Path, data: bytes | None = None) -> Any:
    """The array in a `.npy` file; the object itself (say, a dict) where a single pickled one is in it.

    Pickles may hold dicts, lists, tuples, sets, numbers, strings, bytes, and NumPy arrays and scalars of
    these. data: the file's bytes, where they were read already.

    Raises:
        UserError: the file is missing, damaged, or asks for anything else.
    """
    with reading(path, FIX):
        data = path.read_bytes() if data is None else data
        file = io.BytesIO(data)
        shape, _, dtype = _header(file)
        if not dtype.hasobject:
            return plain_array(data)
        array = _plain(_Unpickler(file).load(), iter(range(len(data) + SPARE_VALUES)))
        if type(array) is not np.ndarray or array.shape != shape or not array.dtype.hasobject:
            raise ValueError("the header does not describe the contents")
        return array.item() if array.size == 1 else array


def plain_array(data: bytes) -> np.ndarray:
    """The array in the bytes of a `.npy` file without pickled objects.

    The header is checked against the size of what follows before any memory is taken for it.

    Raises:
        ValueError: the bytes are something else; NumPy has more errors, so call it within `reading`.
    """
    file = io.BytesIO(data)
    shape, fortran, dtype = _header(file)
    if dtype.hasobject:
        raise ValueError("Object arrays are pickled; only plain numbers are read here")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError("the header does not describe the contents")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran else "C").copy()


def map_npy(path: Path) -> np.ndarray:
    """The array of numbers in a `.npy` file, mapped into memory, read-only."""
    with reading(path, FIX):
        with path.open("rb") as file:
            shape, fortran, dtype = _header(file)
            start = file.tell()
        if dtype.kind not in NUMERIC or dtype.itemsize == 0:  # of none NumPy's mapping would divide by zero
            raise ValueError(f"arrays of type {dtype}")
        return np.memmap(path, dtype, "r", start, shape, order="F" if fortran else "C")


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the array that follows in the file."""
    version = npy_format.read_magic(file)
    reader = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}[version]
    with PARSER:
        shape, fortran, dtype = reader(file)
    if any(n < 0 for n in shape):
        raise ValueError(f"shape {shape}")
    return shape, fortran, dtype
