"""Where every picture of a split lies: found by one pass over its files, then read from a cache folder.

The pass checks all checksums and that every episode is what the specification says. The index is a few
memory-mapped arrays, 16 bytes per picture; nothing is written into the data set's folder.

    <cache>/<data set>-<version>-<split>-<hash>/
        episodes.npy            int64 [E, 3]: the record's first byte and the one after its last; steps
        steps.<picture>.npy     int64 [N, 2], N steps in all: the same of each encoded picture
        steps.<text>.npy        int32 [N]: the number of each step's text …
        texts.json              … among the distinct texts of the feature; written last

What a pass has found of a file it keeps in `<data set>-<version>-<split>-parts/` until it is through: after
an error or an interruption only what is missing is read.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64
from rich.progress import track

from defi.cache import take_turn
from defi.engine.output import write_file
from defi.errors import UserError, one_line, reading
from defi.files import read_json
from defi.npy import map_npy
from defi.rlds.spec import FEATURES, STEPS, Feature, Split, is_instruction, record_files
from defi.rlds.tfrecord import BYTES, INTS, NOTHING, Values, parse_example, read_records

EPISODES, TEXTS = "episodes", "texts.json"
FORMAT = 4
FIX = "delete it, so that it is made again"
READERS = 4  # files that are read at the same time


@dataclass(frozen=True)
class SplitIndex:
    """Arrays of one split, as the index's folder has them. Names of features are paths below `steps/`.

    files: the number of each episode's file. firsts: the number of its first step among all.
    """

    episodes: Int64[np.ndarray, "E 3"]
    files: Int64[np.ndarray, " E"]
    firsts: Int64[np.ndarray, " E"]
    pictures: Mapping[str, Int64[np.ndarray, "N 2"]]
    texts: Mapping[str, tuple[Sequence[str], Int32[np.ndarray, " N"]]]
    fingerprint: str


def open_index(folder: Path, split: Split, spec: Mapping[str, Feature], cache: Path) -> SplitIndex:
    """The index of a split, made if the cache has none of these very files.

    Raises:
        UserError: a file of the split is missing, damaged, or not as the specification says.
    """
    fingerprint, parts = _identify(folder, split)
    name = "-".join([*folder.resolve().parts[-2:], split.name])
    place = cache / f"{name}-{hashlib.sha256(os.fsencode(''.join(parts))).hexdigest()[:16]}"
    pictures = [path for path, feature in spec.items() if path.startswith(STEPS) and feature.is_picture]
    texts = {path: feature for path, feature in spec.items() if is_instruction(path, feature)}
    if not pictures:
        raise UserError(f"{folder / FEATURES}: names no RGB pictures in its steps; nothing to learn from")
    if not (place / TEXTS).is_file():
        try:
            with take_turn(place):  # one process makes it, the others of a training wait
                if not (place / TEXTS).is_file():
                    _build(place, split, pictures, texts, [cache / f"{name}-parts" / part for part in parts])
        except OSError as error:
            where, reason = error.filename or place, error.strerror or one_line(error)
            raise UserError(f"{where}: {reason}; make room, or set data.index to another folder") from None
    return _open(place, split, pictures, list(texts), fingerprint)


def _open(
    place: Path, split: Split, pictures: Sequence[str], texts: Sequence[str], fingerprint: str
) -> SplitIndex:
    """The index that a folder holds; that pictures lie in their files is seen when they are read."""
    words = read_json(place / TEXTS, FIX)
    with reading(place, FIX):
        episodes = map_npy(_file_of(place, EPISODES))
        ends = episodes[:, 2].cumsum()
        steps = int(ends[-1])
        arrays = {name: map_npy(_file_of(place, name)) for name in (*pictures, *texts)}
        valid = (
            episodes.shape == (split.episodes, 3)
            and (episodes[:, 2] >= 0).all()
            and all(arrays[name].shape == (steps, 2) for name in pictures)
            and all(arrays[name].shape == (steps,) for name in texts)
            and all(array.dtype == np.int64 for array in (episodes, *(arrays[name] for name in pictures)))
            and all(isinstance(words[name], list) for name in texts)
            and all(isinstance(text, str) for name in texts for text in words[name])
            and all(((arrays[name] >= 0) & (arrays[name] < len(words[name]))).all() for name in texts)
        )
        if not valid:
            raise ValueError("damaged")
    return SplitIndex(
        episodes=episodes,
        files=np.repeat(np.arange(len(split.shards)), split.lengths),
        firsts=ends - episodes[:, 2],
        pictures={name.removeprefix(STEPS): arrays[name] for name in pictures},
        texts={name.removeprefix(STEPS): (words[name], arrays[name]) for name in texts},
        fingerprint=fingerprint,
    )


def _file_of(place: Path, column: str) -> Path:
    return place / f"{column.replace('/', '.')}.npy"


def _identify(folder: Path, split: Split) -> tuple[str, list[str]]:
    """What identifies the data wherever they lie, and for each file what it is now, as a part's name."""
    specification = (folder / FEATURES).read_bytes()
    data, parts = hashlib.sha256(specification), []
    for shard, length in zip(split.shards, split.lengths):
        try:
            stat = shard.stat()
        except (OSError, ValueError):  # or its name is none
            there = [path.name for path in record_files(folder, split.name)]
            found = f"{len(there)} are there" + (f", the first {there[0]}" if there else "")
            counted = f"dataset_info.json counts {len(split.shards)} files of {split.name}"
            raise UserError(f"{shard}: missing; {counted}, {found}; copy all of them") from None
        line = os.fsencode(f"{shard.name} {stat.st_size} {length};")
        data.update(line)
        stamp = hashlib.sha256(b"%d %d;" % (FORMAT, stat.st_mtime_ns) + line + specification)
        parts.append(f"{shard.name}-{stamp.hexdigest()[:16]}.npz")
    return data.hexdigest()[:16], parts


def _build(
    place: Path, split: Split, pictures: Sequence[str], texts: Mapping[str, Feature], parts: Sequence[Path]
) -> None:
    """parts: the files for what is found in each of the split's, which outlive an error."""
    parts[0].parent.mkdir(exist_ok=True)
    missing = [i for i, part in enumerate(parts) if not part.is_file()]

    def make(i: int) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **_scan(split.shards[i], split.lengths[i], pictures, texts))
        write_file(parts[i], buffer.getvalue())

    with ThreadPoolExecutor(READERS) as pool:
        name = place.name.rpartition("-")[0]
        for _ in track(pool.map(make, missing), f"index of {name}", total=len(missing)):
            pass
    words: dict[str, dict[str, int]] = {name: {} for name in texts}
    for column in (EPISODES, *pictures, *texts):
        _merge(_file_of(place, column), column, parts, words.get(column))
    write_file(place / TEXTS, json.dumps({name: list(distinct) for name, distinct in words.items()}))
    for part in parts:
        part.unlink()
    with suppress(OSError):  # parts of another version of the data
        parts[0].parent.rmdir()


def _scan(
    shard: Path, expected: int, pictures: Sequence[str], texts: Mapping[str, Feature]
) -> dict[str, np.ndarray]:
    """One file's part of the index."""
    episodes: list[tuple[int, int, int]] = []
    columns: dict[str, list] = {name: [] for name in (*pictures, *texts)}
    words: dict[str, dict[str, int]] = {name: {} for name in texts}
    for record in read_records(shard):
        with reading(record.where, f"the file and {FEATURES} do not belong together"):
            example, start = parse_example(record.data), record.start
            own = {
                name: [(start + a, start + b) for a, b in _values(example, name).places] for name in pictures
            }
            for name, feature in texts.items():
                found = read_texts(_values(example, name, feature), record.data, feature)
                own[name] = [words[name].setdefault(text, len(words[name])) for text in found]
            steps = {name: len(values) for name, values in own.items()}
            if len(set(steps.values())) != 1:
                raise ValueError(f"its features have different numbers of steps: {steps}")
        for name, values in own.items():
            columns[name] += values
        episodes.append((start, start + len(record.data), len(own[name])))
    if len(episodes) != expected:
        raise UserError(
            f"{shard}: has {len(episodes)} episodes, dataset_info.json counts {expected}; copy the file again"
        )
    arrays = {name: np.array(columns[name], np.int64).reshape(-1, 2) for name in pictures}
    arrays |= {name: np.array(columns[name], np.int32) for name in texts}
    distinct = json.dumps({name: list(found) for name, found in words.items()})
    episodes = np.array(episodes, np.int64).reshape(-1, 3)
    return {EPISODES: episodes, TEXTS: np.frombuffer(distinct.encode(), np.uint8), **arrays}


def _values(example: Mapping[str, Values], name: str, text: Feature | None = None) -> Values:
    """Raises ValueError if there are none, or of another kind than pictures, or that text, are stored in."""
    if name not in example:
        raise ValueError(f"has no feature {name}")
    if example[name].kind not in (NOTHING, INTS if text and text.kind == "tensor" else BYTES):
        raise ValueError(f"{name} is of another type")
    return example[name]


def read_texts(values: Values, data: bytes, feature: Feature) -> list[str]:
    """The text of each step. Character codes (Language Table) end with the first zero."""
    if feature.kind == "text":
        coded = [data[start:end] for start, end in values.places]
        return [text.decode(errors="surrogateescape") for text in coded]  # what is not UTF-8 stays to be seen
    codes = values.numbers(data).reshape(-1, feature.shape[0])
    return ["".join(map(chr, row[: np.argmin(np.append(row, 0) != 0)])) for row in codes]


def _merge(file: Path, column: str, parts: Sequence[Path], words: dict[str, int] | None) -> None:
    """A column of the index: those of the parts in order. words: the numbers of the texts up to now."""
    arrays = []
    for part in parts:
        with np.load(part, allow_pickle=False) as found:
            array = found[column]
            if words is not None:
                own = json.loads(found[TEXTS].tobytes())[column]
                array = np.array([words.setdefault(text, len(words)) for text in own], np.int32)[array]
        arrays.append(array)
    with file.open("wb") as output:
        np.save(output, np.concatenate(arrays))
        output.flush()
        os.fsync(output.fileno())
