"""Where every picture of a split lies: found by one pass over its files, then read from a cache folder.

The pass checks all checksums and that every episode is what the specification says. The index is a few
memory-mapped arrays, 16 bytes per picture; nothing is written into the data set's folder.

    <cache>/<data set>-<version>-<split>-<hash>/
        episodes.npy      int64 [E, 4]: file, first byte and length of the record's data, first frame
        <picture>.npy     int64 [frames, 2]: first byte of each encoded picture and the one after its last
        texts.json        per instruction feature: the distinct texts
        texts.npy         int32 [features, frames]: the number of each step's
        manifest.json     written last

An interrupted pass keeps what it found in `<data set>-<version>-<split>-parts/`, a part per file: after an
error only files that changed are read again.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64
from rich.progress import track

from defi.cache import take_turn
from defi.engine.output import write_file
from defi.errors import UserError
from defi.files import read_json
from defi.instructions import is_utf8
from defi.npy import map_npy
from defi.rlds.spec import FEATURES, STEPS, Feature, Split, is_instruction, record_files
from defi.rlds.tfrecord import BYTES, INTS, NOTHING, Record, Values, parse_example, read_records

EPISODES, TEXTS, TEXT_NUMBERS, MANIFEST = "episodes.npy", "texts.json", "texts.npy", "manifest.json"
FORMAT = 3
MEND = "delete it, so that it is made anew"
READERS = 4  # files that are read at the same time


@dataclass(frozen=True)
class SplitIndex:
    """Arrays of one split. Names of features are paths below `steps/`.

    damaged: per feature the texts that are not UTF-8, which count as empty.
    """

    episodes: Int64[np.ndarray, "E 4"]
    frames: int
    pictures: Mapping[str, Int64[np.ndarray, "frames 2"]]
    texts: Mapping[str, tuple[Sequence[str], Int32[np.ndarray, " frames"]]]
    damaged: Mapping[str, list[str]]
    fingerprint: str


def open_index(folder: Path, split: Split, spec: Mapping[str, Feature], cache: Path) -> SplitIndex:
    """The index of a split, made if the cache has none of these very files.

    Raises:
        UserError: a file of the split is missing, damaged, or not as the specification says.
    """
    fingerprint, parts = _identify(folder, split)
    name = "-".join([*folder.resolve().parts[-2:], split.name])
    place = cache / f"{name}-{hashlib.sha256(os.fsencode(''.join(parts))).hexdigest()[:16]}"
    pictures = [
        path.removeprefix(STEPS) for path, f in spec.items() if path.startswith(STEPS) and f.is_picture
    ]
    texts = [path.removeprefix(STEPS) for path, f in spec.items() if is_instruction(path, f)]
    if not pictures:
        raise UserError(f"{folder / FEATURES}: names no RGB pictures in its steps; nothing to learn from")
    if not (place / MANIFEST).is_file():
        part_files = [cache / f"{name}-parts" / part for part in parts]
        try:
            with take_turn(place):  # one process makes it, the others of a training wait
                if not (place / MANIFEST).is_file():
                    _build(place, split, spec, pictures, texts, part_files)
        except OSError as error:
            where = error.filename or place
            raise UserError(
                f"{where}: {error.strerror}; make room, or set data.index to another folder"
            ) from None
    return _open(place, split, pictures, texts, fingerprint)


def _open(
    place: Path, split: Split, pictures: Sequence[str], texts: Sequence[str], fingerprint: str
) -> SplitIndex:
    """The index that a folder holds; that pictures lie in their files is seen when they are read."""
    said = read_json(place / TEXTS, MEND)
    numbers, episodes = map_npy(place / TEXT_NUMBERS), map_npy(place / EPISODES)
    arrays = {name: map_npy(place / _file_of(name)) for name in pictures}
    frames = len(next(iter(arrays.values())))
    whole = (
        episodes.shape == (split.episodes, 4)
        and all(array.shape == (frames, 2) for array in arrays.values())
        and all(array.dtype == np.int64 for array in (episodes, *arrays.values()))
        and ((episodes[:, 0] >= 0) & (episodes[:, 0] < len(split.shards))).all()
        and (np.diff(episodes[:, 3], prepend=0, append=frames) >= 0).all()
        and sorted(said) == sorted(texts)
        and numbers.shape == (len(texts), frames)
        and numbers.dtype == np.int32
        and all(_are_numbers_of(row, said[name]) for name, row in zip(texts, numbers))
    )
    if not whole:
        raise UserError(f"{place}: an index that is damaged; {MEND}")
    damaged = {name: [text for text in said[name] if not is_utf8(text)] for name in texts}
    named = {
        name: ([text if is_utf8(text) else "" for text in said[name]], row)
        for name, row in zip(texts, numbers)
    }
    return SplitIndex(episodes, frames, arrays, named, damaged, fingerprint)


def _are_numbers_of(numbers: Int32[np.ndarray, " frames"], texts: Any) -> bool:
    return (
        isinstance(texts, list)
        and all(isinstance(text, str) for text in texts)
        and bool(((numbers >= 0) & (numbers < len(texts))).all())
    )


def _file_of(name: str) -> str:
    return name.replace("/", ".") + ".npy"


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
            mend = "copy all of them, or build the data set again"
            raise UserError(f"{shard}: missing; {counted}, {found}; {mend}") from None
        line = os.fsencode(f"{shard.name} {stat.st_size} {length};")
        data.update(line)
        stamp = hashlib.sha256(b"%d %d;" % (FORMAT, stat.st_mtime_ns) + line + specification)
        parts.append(f"{shard.name}-{stamp.hexdigest()[:16]}.npz")
    return data.hexdigest()[:16], parts


def _build(
    place: Path,
    split: Split,
    spec: Mapping[str, Feature],
    pictures: Sequence[str],
    texts: Sequence[str],
    files: Sequence[Path],
) -> None:
    """`files`: a part for each file of the split, which outlives an error."""
    files[0].parent.mkdir(exist_ok=True)
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    scan = partial(_scan, spec=spec, pictures=pictures, texts=texts)

    def make(i: int) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **scan(split.shards[i], split.lengths[i]))
        write_file(files[i], buffer.getvalue())

    with ThreadPoolExecutor(READERS) as pool:
        jobs = pool.map(make, missing)
        for _ in track(jobs, f"index of {place.name.rpartition('-')[0]}", total=len(missing)):
            pass
    _merge(place, files, pictures, texts)
    write_file(place / MANIFEST, json.dumps({"files": [shard.name for shard in split.shards]}))
    for file in files:
        file.unlink()
    with suppress(OSError):  # parts of another version of the data
        files[0].parent.rmdir()


def _scan(
    shard: Path, expected: int, *, spec: Mapping[str, Feature], pictures: Sequence[str], texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """One file's part of the index: records, steps per episode, places of pictures, texts."""
    records, steps = [], []
    places: dict[str, list] = {name: [] for name in pictures}
    words: dict[str, list[str]] = {name: [] for name in texts}
    for record in read_records(shard):
        where = f"{shard}: record {record.number} at byte {record.offset - 12}"
        try:
            count = _scan_episode(record, spec, places, words)
        except ValueError as error:
            raise UserError(f"{where}: {error}; the file and {FEATURES} do not belong together") from None
        records.append((record.offset, len(record.data)))
        steps.append(count)
    if len(records) != expected:
        raise UserError(
            f"{shard}: has {len(records)} episodes, dataset_info.json counts {expected}; copy the file again"
        )
    arrays = {f"pictures/{name}": np.array(found, np.int64).reshape(-1, 2) for name, found in places.items()}
    for name, found in words.items():
        distinct, arrays[f"numbers/{name}"] = _numbered(found)
        arrays[f"texts/{name}"] = np.frombuffer(json.dumps(distinct).encode(), np.uint8)
    return arrays | {
        "records": np.array(records, np.int64).reshape(-1, 2),
        "steps": np.array(steps, np.int64),
    }


def _scan_episode(
    record: Record, spec: Mapping[str, Feature], places: dict[str, list], words: dict[str, list[str]]
) -> int:
    """Append an episode's pictures and texts; returns its number of steps."""
    example = parse_example(record.data)
    counts = {}
    for name, found in places.items():
        own = _values(example, name, BYTES).bytes_places(record.data)
        found.extend((record.offset + start, record.offset + end) for start, end in own)
        counts[name] = len(own)
    for name, found in words.items():
        feature = spec[STEPS + name]
        said = read_texts(
            _values(example, name, BYTES if feature.kind == "text" else INTS), record.data, feature
        )
        found.extend(said)
        counts[name] = len(said)
    if len(set(counts.values())) != 1:
        raise ValueError(f"its features have different numbers of steps: {counts}")
    return next(iter(counts.values()))


def _values(example: Mapping[str, Values], name: str, kind: int) -> Values:
    values = example.get(STEPS + name)
    if values is None:
        raise ValueError(f"has no feature {STEPS + name}")
    if values.kind not in (NOTHING, kind):
        raise ValueError(f"{STEPS + name} is of another type")
    return values


def read_texts(values: Values, data: bytes, feature: Feature) -> list[str]:
    """The text of each step. Character codes (Language Table) end with the first zero."""
    if feature.kind == "text":
        coded = [data[slice(*place)] for place in values.bytes_places(data)]
        return [text.decode(errors="surrogateescape") for text in coded]  # what is not UTF-8 stays to be seen
    codes = values.ints(data).reshape(-1, feature.shape[0])
    return ["".join(map(chr, row[: np.argmin(np.append(row, 0) != 0)])) for row in codes]


def _numbered(texts: Iterable[str]) -> tuple[list[str], Int32[np.ndarray, " N"]]:
    """The distinct texts, and which of them each text is."""
    distinct: dict[str, int] = {}
    numbers = np.array([distinct.setdefault(text, len(distinct)) for text in texts], np.int32)
    return list(distinct), numbers


def _merge(place: Path, files: Sequence[Path], pictures: Sequence[str], texts: Sequence[str]) -> None:
    """The parts as one set of arrays; pictures go to disk part by part."""
    episodes, frames = [], 0
    words: dict[str, list[str]] = {name: [] for name in texts}
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in texts}
    for number, file in enumerate(files):
        with np.load(file, allow_pickle=False) as part:
            steps = part["steps"]
            first = frames + np.cumsum(steps) - steps
            episodes.append(np.column_stack([np.full(len(steps), number), part["records"], first]))
            frames += int(steps.sum())
            for name in texts:
                numbers[name].append(part[f"numbers/{name}"] + len(words[name]))
                words[name] += json.loads(part[f"texts/{name}"].tobytes())
    for name in pictures:
        array = np.lib.format.open_memmap(place / _file_of(name), "w+", np.int64, (frames, 2))
        at = 0
        for file in files:
            with np.load(file, allow_pickle=False) as part:
                found = part[f"pictures/{name}"]
            array[at : at + len(found)] = found
            at += len(found)
        array.flush()
    episodes = np.concatenate(episodes).astype(np.int64)
    write_npy(place / EPISODES, episodes)
    kept, rows = {}, np.zeros((len(words), frames), np.int32)
    for row, (name, said) in enumerate(words.items()):
        kept[name], order = _numbered(said)
        rows[row] = order[np.concatenate(numbers[name])]
    write_file(place / TEXTS, json.dumps(kept))
    write_npy(place / TEXT_NUMBERS, rows)


def write_npy(path: Path, array: np.ndarray) -> None:
    """An `.npy` file, there as a whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_file(path, buffer.getvalue())
