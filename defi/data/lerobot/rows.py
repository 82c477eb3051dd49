"""Columns and rows of Parquet files, as arrays."""

from bisect import bisect, bisect_left
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from defi.errors import UserError, reading

FIX = "copy the data set again"
LARGEST_GROUP = 2**30  # bytes of a row group, unpacked
KEPT, KEPT_BYTES = 4, 2**28  # row groups that a process keeps, of the columns that were asked for; the last
# that was read however large it is


def columns_of(file: Path) -> list[str]:
    """Names of a file's columns. UserError if it is no Parquet file, or a part of it fills the memory."""
    with reading(file, FIX):
        return _metadata(file, file.stat().st_mtime_ns).schema.to_arrow_schema().names


@lru_cache(maxsize=1024)
def _metadata(file: Path, changed: int) -> Any:
    """Of a file as it is since `changed` (ns)."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("data.format=lerobot: needs the package pyarrow; pip install pyarrow") from None
    found, most = pq.read_metadata(file), max(2**20, 2**10 * file.stat().st_size)
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        if group.total_byte_size > LARGEST_GROUP or group.num_rows > most:
            raise ValueError(f"row group {number} has {group.total_byte_size:,} bytes")
    return found


def read_table(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Whole columns. UserError, which names it, if one is missing, or has rows without a value."""
    with reading(file, FIX):
        table = _open(file, names, file.stat().st_mtime_ns).read(list(names), use_threads=False)
        return {name: _array(table[name], name) for name in names}


def read_rows(file: Path, names: Sequence[str], first: int, count: int) -> dict[str, np.ndarray]:
    """Columns of consecutive rows; the row groups that hold them are kept for the next call."""
    with reading(file, FIX):
        changed, parts = file.stat().st_mtime_ns, []
        starts = _group_starts(file, changed)
        if first + count > starts[-1]:
            raise ValueError(f"has {starts[-1]} rows, row {first + count - 1} was asked for")
        for group in range(bisect(starts, first) - 1, bisect_left(starts, first + count)):
            begin = max(first - starts[group], 0)
            table = _group(file, tuple(names), group, changed)
            parts.append(table.slice(begin, first + count - starts[group] - begin))
        return {name: np.concatenate([_array(part[name], name) for part in parts]) for name in names}


@lru_cache(maxsize=1024)
def _group_starts(file: Path, changed: int) -> list[int]:
    """Rows before each row group, and of all."""
    meta = _metadata(file, changed)
    return np.cumsum([0, *(meta.row_group(n).num_rows for n in range(meta.num_row_groups))]).tolist()


_kept: dict[tuple, Any] = {}  # those row groups, the latest at the end


def _group(file: Path, names: tuple[str, ...], group: int, changed: int) -> Any:
    """A row group. There is no lock, which a fork could copy in the hands of a thread that it does not."""
    key = file, names, group, changed
    table = _kept.pop(key, None)
    if table is None:
        opened = _open(file, names, changed)
        table = opened.read_row_group(group, list(names), use_threads=False)  # threads do not outlive a fork
    _kept[key] = table
    for older in list(_kept)[:-1]:
        if len(_kept) <= KEPT and sum(each.nbytes for each in list(_kept.values())) <= KEPT_BYTES:
            break
        _kept.pop(older, None)
    return table


def _open(file: Path, names: Sequence[str], changed: int) -> Any:
    """For this call alone: readers may not be shared by threads."""
    metadata = _metadata(file, changed)
    from pyarrow.parquet import ParquetFile

    opened = ParquetFile(file, metadata=metadata)
    if missing := [name for name in names if name not in (there := opened.schema_arrow.names)]:
        raise ValueError(f"has no column {missing[0]}, but {', '.join(there[:20])}")
    return opened


def _array(column: Any, name: str) -> np.ndarray:
    """Numbers [N] or vectors [N, size], else objects (texts, dicts with a picture's bytes)."""
    import pyarrow as pa

    kind = column.type
    if column.null_count:
        raise ValueError(f"{name}: {column.null_count} values are missing")
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return column.to_numpy()
    rows = [chunk.flatten() for chunk in column.chunks]  # of these rows only
    flat = pa.chunked_array(rows, kind.value_type).to_numpy()
    sizes = np.concatenate([np.asarray(chunk.value_lengths()) for chunk in column.chunks] or [np.zeros(1)])
    if flat.dtype.kind not in "fiub" or len(set(sizes.tolist())) > 1:
        raise ValueError(f"{name}: its rows are not vectors of one length")
    return flat.reshape(len(column), -1)
