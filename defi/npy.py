"""Read `.npy` files that hold pickled dictionaries, without giving the file a way to run code.

CALVIN keeps its language annotations as a pickled dict in a `.npy` file. `numpy.load(allow_pickle=True)`
calls whatever the pickle names. Here every global that a pickle may name is an inert stand-in: NumPy's
constructors only record their arguments, arrays are then built by `numpy.frombuffer` from checked types and
sizes, and any other global is refused by name, without being imported.
"""

import io
import math
import pickle
import pickletools
import tokenize
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from defi.errors import UserError

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_NUMERIC = frozenset("biufcSU")
_MULTIARRAY = frozenset({"numpy.core.multiarray", "numpy._core.multiarray"})
# What pickle and NumPy raise on bytes that are not what they should be.
_DAMAGE = (
    *(ValueError, TypeError, LookupError, AttributeError, EOFError, ArithmeticError),
    *(MemoryError, RecursionError, ImportError, SyntaxError, pickle.UnpicklingError, tokenize.TokenError),
)


class _Refused(Exception):
    """The pickle asks for something that is not plain data."""


class _Global:
    """Stands for one permitted global; calling it records the arguments, nothing else."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        if self.name == "encode":  # how protocol 2 spells bytes
            text, encoding = args
            if type(text) is not str or encoding not in ("latin1", "latin-1"):
                raise _Refused("_codecs.encode with something else than Latin-1 text")
            return text.encode("latin-1")
        if self.name == "ndarray":
            raise _Refused("a direct call of numpy.ndarray")
        return _Record(self.name, args)

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"a new state for the global {self.name}")


class _Record:
    """A call seen in the pickle: `dtype`, `_reconstruct` (an array) or `scalar`, with its later state."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple) -> None:
        self.kind, self.args, self.state = kind, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Global:
        if module in _MULTIARRAY and name in ("_reconstruct", "scalar"):
            return _Global(name)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Global(name)
        if module == "_codecs" and name == "encode":
            return _Global(name)
        raise _Refused(f"the global {module}.{name}")


def _dtype(record: Any) -> np.dtype:
    name = record.args[0] if type(record) is _Record and record.kind == "dtype" and record.args else None
    if type(name) is not str:
        raise _Refused("something else than a NumPy type where one belongs")
    if name in ("O", "O8"):
        return np.dtype(object)
    if name[:1] not in _NUMERIC or not name[1:].isdigit():
        raise _Refused(f"arrays of type {name!r}")
    dtype = np.dtype(name)
    order = record.state[1] if record.state else "|"
    if dtype.itemsize == 0 or order not in ("<", ">", "=", "|"):
        raise _Refused(f"arrays of type {name!r} in byte order {order!r}")
    return dtype if order == "|" else dtype.newbyteorder(order)


class _Builder:
    """Turns the unpickled records into arrays. Shared objects are visited once; cycles are refused."""

    def __init__(self) -> None:
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()

    def build(self, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        key = id(value)
        if key in self.done:
            return self.done[key]
        if key in self.open:
            raise _Refused("a container that holds itself")
        self.open.add(key)
        self.done[key] = built = self._new(value)
        self.open.discard(key)
        return built

    def _new(self, value: Any) -> Any:
        if type(value) is dict:
            return {self.build(k): self.build(v) for k, v in value.items()}
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.build(item) for item in value)
        if type(value) is _Record and value.kind == "_reconstruct":
            return self._array(value)
        if type(value) is _Record and value.kind == "scalar":
            dtype, data = _dtype(value.args[0]), value.args[1]
            if type(data) is not bytes or len(data) != dtype.itemsize or dtype.hasobject:
                raise _Refused("a scalar of the wrong size")
            return np.frombuffer(data, dtype)[0]
        raise _Refused(f"an object of type {getattr(value, 'kind', type(value).__name__)}")

    def _array(self, record: _Record) -> np.ndarray:
        if type(record.state) is not tuple or len(record.state) != 5:
            raise _Refused("an array without contents")
        _, shape, dtype, fortran, data = record.state
        dtype = _dtype(dtype)
        if type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape):
            raise _Refused("an array without a shape")
        size = math.prod(shape)
        if dtype.hasobject:
            if type(data) is not list or len(data) != size:
                raise _Refused("an array whose size and contents differ")
            flat = np.empty(size, object)
            for i, item in enumerate(data):
                flat[i] = self.build(item)
        else:
            if type(data) is not bytes or len(data) != size * dtype.itemsize:
                raise _Refused("an array whose size and contents differ")
            flat = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
        return flat.reshape(shape, order="F" if fortran else "C")


def load_npy(path: str | Path) -> Any:
    """The array in a `.npy` file; the object itself (say, a dict) where the file holds a single pickled one.

    As for CALVIN's own reader it may be the only item of an array.

    Only dicts, lists, tuples, sets, numbers, strings, bytes, and NumPy arrays and scalars of these are read.

    Raises:
        UserError: the file is missing, damaged, or asks for anything else; the message names both.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return parse_npy(data, path)


def parse_npy(data: bytes, path: Path) -> Any:
    """As `load_npy`, of a file's bytes; `path` names the file in errors."""
    try:
        return _load(data)
    except _Refused as refusal:
        raise UserError(f"{path}: refused, it holds {refusal}; only plain data is read") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable .npy file ({reason}); copy or write it again") from None


def plain_array(data: bytes) -> np.ndarray:
    """The array in the bytes of a `.npy` file without pickled objects.

    The header is checked against the size of what follows before any memory is taken for it.

    Raises:
        ValueError: the bytes are something else.
    """
    shape, fortran, dtype, content = _split(data)
    if dtype.hasobject:
        raise ValueError("Object arrays are pickled; only plain numbers are read here")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError("the header does not describe the contents")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").copy()


def map_npy(path: Path) -> np.ndarray:
    """The array of numbers in a `.npy` file, mapped into memory to be read only.

    Raises:
        UserError: the file is missing, or its header does not describe its contents.
    """
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _header(file)
            start, size = file.tell(), path.stat().st_size
        if dtype.kind not in _NUMERIC or dtype.itemsize == 0 or dtype.shape:
            raise ValueError(f"arrays of type {dtype}")
        if start + math.prod(shape) * dtype.itemsize != size:
            raise ValueError("the header does not describe the contents")
        if size == start:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
    except (*_DAMAGE, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable .npy file ({reason}); copy or write it again") from None


def _split(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, bytes]:
    """Shape, Fortran order and type from the header of a `.npy` file, and the bytes after it."""
    file = io.BytesIO(data)
    return (*_header(file), data[file.tell() :])


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the array that follows in the file."""
    version = npy_format.read_magic(file)
    if version == (1, 0):
        header = npy_format.read_array_header_1_0(file)
    elif version == (2, 0):
        header = npy_format.read_array_header_2_0(file)
    else:
        raise ValueError(f"format version {version}")
    if any(n < 0 for n in header[0]):
        raise ValueError(f"shape {header[0]}")
    return header


def _refuse_bombs(pickled: bytes) -> None:
    """Look through a pickle before it is loaded: a number of a few bytes may ask for gigabytes of memory."""
    for places, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > places:
            raise ValueError(f"{opcode.name} {argument} within the first {places} operations")


def _load(data: bytes) -> Any:
    shape, _, dtype, content = _split(data)
    if not dtype.hasobject:
        return plain_array(data)
    _refuse_bombs(content)
    array = _Builder().build(_Unpickler(io.BytesIO(content)).load())
    if type(array) is not np.ndarray or array.shape != shape or not array.dtype.hasobject:
        raise ValueError("the header does not describe the contents")
    return array.item() if array.size == 1 else array
