"""Columns and rows of Parquet files, as arrays."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from defi.errors import UserError, reading

FIX = "copy the data set again"
LARGEST_GROUP = 2**30  # bytes of a row group, unpacked
KEPT = 4  # row groups that a process keeps, each of the columns that were asked for


def open_parquet(file: Path) -> Any:
    """An open file. UserError if it is none, or a part of it is too large for the memory."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("data.format=lerobot: needs the package pyarrow; pip install pyarrow") from None
    with reading(file, FIX):
        if not file.is_file():
            raise FileNotFoundError
        found = pq.ParquetFile(file)
        for number in range(found.metadata.num_row_groups):
            group = found.metadata.row_group(number)
            if group.total_byte_size > LARGEST_GROUP or group.num_rows > max(
                2**20, 2**10 * file.stat().st_size
            ):
                raise ValueError(f"row group {number} has {group.total_byte_size:,} bytes")
        return found


def read_table(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Whole columns. UserError, which names it, if one is missing, or has rows without a value."""
    with reading(file, FIX):
        opened = open_parquet(file)
        _check_names(names, opened.schema_arrow.names)
        table = opened.read(list(names), use_threads=False)
        return {name: _array(table[name], name) for name in names}


def read_rows(file: Path, names: Sequence[str], first: int, count: int) -> dict[str, np.ndarray]:
    """Columns of consecutive rows; the row groups that hold them are kept for the next call."""
    import pyarrow as pa

    with reading(file, FIX):
        changed = file.stat().st_mtime_ns
        starts = _group_starts(file, changed)
        if first + count > starts[-1]:
            raise ValueError(f"has {starts[-1]} rows, row {first + count - 1} was asked for")
        parts = [
            _group(file, tuple(names), group, changed).slice(
                max(first - start, 0), first + count - max(start, first)
            )
            for group, (start, end) in enumerate(zip(starts, starts[1:]))
            if start < first + count and end > first
        ]
        table = pa.concat_tables(parts)
        return {name: _array(table[name], name) for name in names}


@lru_cache(maxsize=1024)
def _group_starts(file: Path, changed: int) -> tuple[int, ...]:
    """Rows before each row group of a file as it is since `changed`, and of all."""
    meta = open_parquet(file).metadata
    return tuple(np.cumsum([0, *(meta.row_group(n).num_rows for n in range(meta.num_row_groups))]).tolist())


@lru_cache(maxsize=KEPT)
def _group(file: Path, names: tuple[str, ...], group: int, changed: int) -> Any:
    opened = open_parquet(file)
    _check_names(names, opened.schema_arrow.names)
    return opened.read_row_group(group, list(names), use_threads=False)  # threads do not outlive a fork


def _check_names(names: Sequence[str], there: Sequence[str]) -> None:
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"has no column {missing[0]}, but {', '.join(there[:20])}")


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
