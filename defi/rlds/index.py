"""Where every picture of a split lies: found by one pass over its files, then read from a cache folder.

The pass checks all checksums and that every episode is what the specification says. Nothing is written into
the data set's folder. For E episodes of N steps in all, P pictures and T texts per step:

    <cache>/<data set>-<version>-<split>-<hash>/
        episodes.npy   int64 [E, 3]: first byte of the record's data and the one after its last; its steps
        pictures.npy   int64 [N, P, 2]: the same two bytes of each encoded picture; memory-mapped
        numbers.npy    int32 [N, T]: which of its feature's texts each step has; memory-mapped
        texts.json     the texts of each feature; written last

What the pass has found of a file it keeps in `<data set>-<version>-<split>-parts/` until it is through: after
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

from defi.engine.output import take_turn, write_file
from defi.errors import UserError, one_line, reading
from defi.files import read_json
from defi.npy import map_npy
from defi.rlds.spec import FEATURES, STEPS, Feature, Split, is_instruction, record_files
from defi.rlds.tfrecord import BYTES, INTS, NOTHING, Values, parse_example, read_records

ARRAYS, TEXTS = ("episodes", "pictures", "numbers"), "texts.json"
FORMAT = 4
FIX = "delete it, so that it is made again"
READERS = 4  # files that are read at the same time

Features = Mapping[str, Feature]


@dataclass(frozen=True)
class SplitIndex:
    """The arrays of a split. Names of features are paths below `steps/`."""

    episodes: Int64[np.ndarray, "E 3"]
    pictures: Mapping[str, Int64[np.ndarray, "N 2"]]
    texts: Mapping[str, tuple[Sequence[str], Int32[np.ndarray, " N"]]]
    fingerprint: str


def open_index(folder: Path, split: Split, spec: Features, cache: Path) -> SplitIndex:
    """The index of a split, made if the cache has none of these very files.

    Raises:
        UserError: a file of the split is missing, damaged, or not as the specification says.
    """
    fingerprint, parts = _identify(folder, split)
    name = "-".join([*folder.resolve().parts[-2:], split.name])
    place = cache / f"{name}-{hashlib.sha256(os.fsencode(''.join(parts))).hexdigest()[:16]}"
    features = {path: f for path, f in spec.items() if path.startswith(STEPS)}
    pictures = {path: feature for path, feature in features.items() if feature.is_picture}
    texts = {path: feature for path, feature in features.items() if is_instruction(path, feature)}
    if not pictures:
        raise UserError(f"{folder / FEATURES}: names no RGB pictures in its steps; nothing to learn from")
    if not (place / TEXTS).is_file():
        try:
            with take_turn(place):  # one process makes it, the others of a training wait
                if not (place / TEXTS).is_file():
                    _build(place, split, pictures, texts, [cache / f"{name}-parts" / part for part in parts])
        except OSError as error:
            where, reason = error.filename or place, error.strerror or one_line(error)
            raise UserError(
                f"{where}: {reason}; free some space, or set data.index to another folder"
            ) from None
    return _open(place, split, list(pictures), list(texts), fingerprint)


def _open(
    place: Path, split: Split, pictures: Sequence[str], texts: Sequence[str], fingerprint: str
) -> SplitIndex:
    """The index that a folder holds; that pictures lie in their files is seen when they are read."""
    words = read_json(place / TEXTS, FIX)
    with reading(place, FIX):
        episodes, places, numbers = (map_npy(place / f"{name}.npy") for name in ARRAYS)
        steps = int(episodes[:, 2].sum())
        valid = (
            episodes.dtype == places.dtype == np.int64
            and (episodes.shape, places.shape) == ((split.episodes, 3), (steps, len(pictures), 2))
            and (episodes[:, 2] >= 0).all()
            and (numbers.dtype, numbers.shape) == (np.int32, (steps, len(texts)))
            and all(isinstance(words[name], list) for name in texts)
            and all(isinstance(text, str) for name in texts for text in words[name])
            and ((numbers >= 0) & (numbers < [len(words[name]) for name in texts])).all()
        )
        if not valid:
            raise ValueError("damaged")
    return SplitIndex(
        episodes,
        {name.removeprefix(STEPS): places[:, i] for i, name in enumerate(pictures)},
        {name.removeprefix(STEPS): (words[name], numbers[:, i]) for i, name in enumerate(texts)},
        fingerprint,
    )


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


def _build(place: Path, split: Split, pictures: Features, texts: Features, parts: Sequence[Path]) -> None:
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
    for name in ARRAYS:
        found = [_read_part(part, name, words) for part in parts]
        with (place / f"{name}.npy").open("wb") as file:
            np.save(file, np.concatenate(found))
            file.flush()
            os.fsync(file.fileno())
    write_file(place / TEXTS, json.dumps({name: list(numbers) for name, numbers in words.items()}))
    for part in parts:
        part.unlink()
    with suppress(OSError):  # parts of another version of the data
        parts[0].parent.rmdir()


def _read_part(part: Path, name: str, words: Mapping[str, dict[str, int]]) -> np.ndarray:
    """An array of a part; texts are numbered as in `words`, which grows."""
    with np.load(part, allow_pickle=False) as found:
        array = found[name]
        if name == "numbers":
            own = json.loads(found["texts"].tobytes())
            for column, (feature, known) in zip(array.T, words.items()):
                numbers = [known.setdefault(text, len(known)) for text in own[feature]]
                column[:] = np.array(numbers, np.int32)[column]
    return array


def _scan(shard: Path, expected: int, pictures: Features, texts: Features) -> dict[str, np.ndarray]:
    """One file's part of the index."""
    words: dict[str, dict[str, int]] = {name: {} for name in texts}
    episodes = [np.empty((0, 3), np.int64)]
    places, numbers = [np.empty((0, len(pictures), 2), np.int64)], [np.empty((0, len(texts)), np.int32)]
    for where, start, data in read_records(shard):
        with reading(where, f"the file and {FEATURES} do not belong together"):
            example = parse_example(data)
            found = {name: _values(example, name, BYTES).places for name in pictures}
            for name, feature in texts.items():
                values = _values(example, name, BYTES if feature.kind == "text" else INTS)
                own = read_texts(values, data, feature)
                found[name] = [words[name].setdefault(text, len(words[name])) for text in own]
            counts = {name: len(values) for name, values in found.items()}
            if len(set(counts.values())) != 1:
                raise ValueError(f"its features have different numbers of steps: {counts}")
        steps = max(counts.values())
        episodes.append(np.array([[start, start + len(data), steps]]))
        own = np.array([found[name] for name in pictures], np.int64).reshape(len(pictures), steps, 2)
        places.append(own.swapaxes(0, 1) + start)
        numbers.append(np.array([found[name] for name in texts], np.int32).reshape(len(texts), steps).T)
    if len(episodes) - 1 != expected:
        counted = f"has {len(episodes) - 1} episodes, dataset_info.json counts {expected}"
        raise UserError(f"{shard}: {counted}; copy the file again")
    arrays = {name: np.concatenate(rows) for name, rows in zip(ARRAYS, (episodes, places, numbers))}
    distinct = json.dumps({name: list(known) for name, known in words.items()})
    return arrays | {"texts": np.frombuffer(distinct.encode(), np.uint8)}


def _values(example: Mapping[str, Values], name: str, kind: int) -> Values:
    """Raises ValueError if there are none, or of another kind."""
    if name not in example:
        raise ValueError(f"has no feature {name}")
    if example[name].kind not in (NOTHING, kind):
        raise ValueError(f"{name} is of another type")
    return example[name]


def read_texts(values: Values, data: bytes, feature: Feature) -> list[str]:
    """The text of each step. Character codes (Language Table) end with the first zero."""
    if feature.kind == "text":
        coded = [data[start:end] for start, end in values.places]
        return [text.decode(errors="surrogateescape") for text in coded]  # what is not UTF-8 stays to be seen
    codes = values.numbers(data).reshape(-1, feature.shape[0])
    return ["".join(map(chr, row[: np.argmin(np.append(row, 0) != 0)])) for row in codes]
