"""The restricted reader of `.npy` files: it agrees with NumPy on plain data and runs nothing."""

import collections
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from defi.errors import UserError
from defi.npy import load_npy

HEADER = io.BytesIO()
np.lib.format.write_array_header_1_0(HEADER, {"descr": "|O", "fortran_order": False, "shape": ()})


def write_pickle(path: Path, value: object, protocol: int = 4) -> Path:
    """A `.npy` file whose pickle holds `value` in a 0-d object array."""
    array = np.empty((), object)
    array[()] = value
    path.write_bytes(HEADER.getvalue() + pickle.dumps(array, protocol=protocol))
    return path


def plain() -> dict:
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    shared = [1, 2]
    return {
        "ann": ["open the drawer", "Schublade öffnen"],
        "emb": numbers,
        "fortran": np.asfortranarray(numbers),
        "big-endian": numbers.astype(">f8"),
        "flags": np.array([True, False]),
        "names": np.array(["a", "bcd"]),
        "indx": [(0, 63), (np.int64(64), np.int64(127))],
        "half": np.float16(0.5),
        "nested": {"none": None, "bytes": b"\x00\xff", 3: 2.5, "huge": 2**80},
        "objects": np.array([{"a": 1}, [np.zeros(2)]], dtype=object),
        "twice": (shared, shared),
    }


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, np.ndarray) and a.dtype.hasobject:
        assert a.shape == b.shape
        assert_same(a.tolist(), b.tolist())
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_dicts_read_as_numpy_reads_them(tmp_path: Path, protocol: int) -> None:
    value = plain() if protocol < 4 else plain() | {"set": {1, 2}}
    path = write_pickle(tmp_path / "a.npy", value, protocol)
    assert_same(load_npy(path), np.load(path, allow_pickle=True).item())


def test_what_numpy_saves(tmp_path: Path) -> None:
    for i, value in enumerate([plain(), [1, "two"], np.eye(3), np.array(["x", None], dtype=object)]):
        np.save(tmp_path / f"{i}.npy", value, allow_pickle=True)
        expected = np.load(tmp_path / f"{i}.npy", allow_pickle=True)
        assert_same(load_npy(tmp_path / f"{i}.npy"), expected.item() if expected.shape == () else expected)


class Call:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (lambda path: Call(os.system, f"touch {path}"), "posix.system"),
        (lambda path: Call(eval, f"open({str(path)!r}, 'w')"), "eval"),
        (lambda path: Call(open, str(path), "w"), "open"),
        (lambda path: collections.OrderedDict(a=1), "collections.OrderedDict"),
        (lambda path: Call(np.fromfile, str(path)), "fromfile"),
    ],
)
def test_other_globals_are_refused_by_name(tmp_path: Path, value, name: str, protocol: int) -> None:
    victim = tmp_path / "victim"
    path = write_pickle(tmp_path / "bad.npy", {"language": value(victim)}, protocol)
    with pytest.raises(UserError, match=rf"bad\.npy.*{name}"):
        load_npy(path)
    assert not victim.exists()


def array_pickle(dtype: str, state: tuple, shape: tuple, data: object) -> bytes:
    """The pickle NumPy writes for an array, with a type state, a shape and contents of our choice."""

    class DType:
        def __reduce__(self):
            return np.dtype, (dtype, False, True), state

    class Array:
        def __reduce__(self):
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, shape, DType(), False, data)

    return pickle.dumps(Array(), protocol=4)


@pytest.mark.parametrize(
    ("dtype", "state", "shape", "data"),
    [
        # NumPy would take these bytes for pointers to Python objects.
        ("V8", (3, "|", None, ("x",), {"x": (np.dtype(object), 0)}, 8, 1, 0), (), b"\x41" * 8),
        ("O8", (3, "|", None, None, None, -1, -1, 0), (), b"\x41" * 8),
        ("f8", (3, "<", None, None, None, -1, -1, 0), (10**15,), b""),
        ("f8", (3, "<", None, None, None, -1, -1, 0), (-1,), b"\x00" * 8),
        ("f8", (3, "<", None, None, None, -1, -1, 0), (2,), b"\x00" * 8),
        ("f8,f8", (3, "|", None, None, None, -1, -1, 0), (1,), b"\x00" * 16),
    ],
)
def test_arrays_that_lie_are_refused(tmp_path: Path, dtype: str, state: tuple, shape: tuple, data) -> None:
    path = tmp_path / "lie.npy"
    path.write_bytes(HEADER.getvalue() + array_pickle(dtype, state, shape, data))
    with pytest.raises(UserError, match=r"lie\.npy"):
        load_npy(path)


def test_a_container_in_itself_is_refused(tmp_path: Path) -> None:
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(UserError, match=r"cycle\.npy: cannot be read"):
        load_npy(write_pickle(tmp_path / "cycle.npy", cycle))


def test_a_short_pickle_may_not_grow(tmp_path: Path) -> None:
    """Each level holds the one below twice: 2^60 values."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    with pytest.raises(UserError, match=r"bomb\.npy: .*repeats its values too often"):
        load_npy(write_pickle(tmp_path / "bomb.npy", value))


def test_an_array_is_made_once_however_often_it_is_named(tmp_path: Path) -> None:
    """Two bytes of a pickle name it again; copies of it could fill any memory."""
    array = np.arange(5)
    np.save(tmp_path / "a.npy", {"all": [array] * 3}, allow_pickle=True)
    found = load_npy(tmp_path / "a.npy")["all"]
    assert found[0] is found[1] is found[2]
    np.testing.assert_array_equal(found[0], array)


def test_arrays_without_values(tmp_path: Path) -> None:
    value = {"emb": np.zeros((0, 1, 384), np.float32), "objects": np.zeros((0, 2), object)}
    assert_same(load_npy(write_pickle(tmp_path / "a.npy", value)), value)


def test_every_truncation_is_one_clear_line(tmp_path: Path) -> None:
    whole = write_pickle(tmp_path / "a.npy", plain()).read_bytes()
    for length in range(0, len(whole), 7):
        path = tmp_path / "cut.npy"
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.npy: [^\n]+$"):
            load_npy(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.npy: missing"):
        load_npy(tmp_path / "none.npy")
