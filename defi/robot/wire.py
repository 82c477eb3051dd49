"""Messages between a robot and its policy: msgpack, with arrays as openpi writes them.

An array is {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}, one number of NumPy
{b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}. Nothing that is read takes more memory than a few
times the message, and no type in it is looked up by name. Nothing here needs PyTorch.
"""

import math
from typing import Any

import msgpack
import numpy as np

from defi.errors import UserError, reading

TYPES = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}  # never objects
LONGEST = 4096  # list or dict: msgpack takes memory for as many as are announced, at each level
MOST = 100_000  # values in lists and dicts: each takes up to 60 times the memory that it takes in a message
FIX = "send msgpack with arrays of numbers as openpi's client does"


def pack(message: Any) -> bytes:
    """Dicts, lists, texts, bytes, numbers and arrays of numbers as bytes.

    Raises:
        UserError: something else is in it, an array of objects or texts say.
    """
    with reading("message", "give dicts, lists, texts, numbers and arrays of numbers"):
        return msgpack.packb(message, default=_plain)


def unpack(message: bytes) -> Any:
    """What `pack`, or openpi's client, made of it. Arrays are views of the message, not to be written to.

    Raises:
        UserError: it is damaged, or holds an array that is not of plain numbers or not of the size it says.
    """
    left = MOST

    def counted(found: Any) -> Any:
        nonlocal left
        left -= len(found)
        if left < 0:
            raise UserError(f"message: more than {MOST:,} values; {FIX}")
        return found

    with reading("message", FIX):
        return msgpack.unpackb(
            message,
            object_hook=lambda found: _array(counted(found)),
            list_hook=counted,
            max_array_len=LONGEST,
            max_map_len=LONGEST,
            max_ext_len=0,  # no types of others
        )


def _plain(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"{type(value).__name__} cannot be sent")
    name = _known(value.dtype.str)
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": name}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": name, b"shape": value.shape}


def _array(found: dict[Any, Any]) -> Any:
    if b"__npgeneric__" in found and isinstance(found[b"data"], (bool, int, float)):
        return np.dtype(_known(found[b"dtype"])).type(found[b"data"])
    if b"__ndarray__" not in found:
        return found
    data, dtype, shape = found[b"data"], np.dtype(_known(found[b"dtype"])), found[b"shape"]
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        raise UserError(f"message: an array is not of the shape that it says; {FIX}")
    return np.ndarray(shape, dtype, buffer=data)


def _known(dtype: Any) -> str:
    if not isinstance(dtype, str) or dtype.lstrip("<>|=") not in TYPES:
        raise UserError(f"message: an array of {str(dtype)[:20]!r}; give numbers, uint8 or float32 say")
    return dtype
