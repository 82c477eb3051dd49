"""Where every picture of a split lies: found by one pass over its files, then read from a cache folder.

The pass checks all checksums and that every episode is what the specification says. The index is a few
memory-mapped arrays, 16 bytes per picture; nothing is written into the data set's folder.

    <cache>/<data set>-<version>-<split>-<hash>/
        episodes.npy      int64 [E, 4]: file, first byte and length of the record's data, first frame
        <picture>.npy     int64 [frames, 2]: first byte of each encoded picture and the one after its last
        texts.npz         per instruction feature: the distinct texts, and int32 [E], each episode's
        manifest.json     written last

An interrupted pass keeps what it found, file by file, in `parts/`.
"""

import fcntl
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64
from rich.progress import track

from defi.engine.output import write_file
from defi.errors import UserError
from defi.rlds.spec import FEATURES, STEPS, Feature, Split, is_instruction
from defi.rlds.tfrecord import BYTES, INTS, Record, Values, parse_example, read_records

EPISODES, TEXTS, MANIFEST = "episodes.npy", "texts.npz", "manifest.json"
READERS = 4  # files that are read at the same time


@dataclass(frozen=True)
class SplitIndex:
    """Arrays of one split. Names of features are paths below `steps/`."""

    episodes: Int64[np.ndarray, "E 4"]
    frames: int
    pictures: Mapping[str, Int64[np.ndarray, "frames 2"]]
    texts: Mapping[str, tuple[Sequence[str], Int32[np.ndarray, " E"]]]
    fingerprint: str


def open_index(folder: Path, split: Split, spec: Mapping[str, Feature], cache: Path) -> SplitIndex:
    """The index of a split, made if the cache has none of these very files.

    Raises:
        UserError: a file of the split is missing, damaged, or not as the specification says.
    """
    fingerprint, version = _identify(folder, split)
    place = cache / "-".join([*folder.resolve().parts[-2:], split.name, version])
    pictures = [
        path.removeprefix(STEPS) for path, f in spec.items() if path.startswith(STEPS) and f.is_picture
    ]
    texts = [path.removeprefix(STEPS) for path, f in spec.items() if is_instruction(path, f)]
    if not pictures:
        raise UserError(f"{folder / FEATURES}: names no RGB pictures in its steps; nothing to learn from")
    if not (place / MANIFEST).is_file():
        with _locked(place):
            if not (place / MANIFEST).is_file():  # another process may have made it meanwhile
                _build(place, split, spec, pictures, texts)
    with np.load(place / TEXTS, allow_pickle=False) as file:
        named = {name: (file[f"texts/{name}"].tolist(), file[f"ids/{name}"]) for name in texts}
    episodes = np.load(place / EPISODES, mmap_mode="r")
    arrays = {name: np.load(place / _file_of(name), mmap_mode="r") for name in pictures}
    return SplitIndex(episodes, len(arrays[pictures[0]]), arrays, named, fingerprint)


def _file_of(name: str) -> str:
    return name.replace("/", ".") + ".npy"


def _identify(folder: Path, split: Split) -> tuple[str, str]:
    """What identifies the data wherever they lie, and what these files as they are now."""
    specification = (folder / FEATURES).read_bytes()
    data, files = hashlib.sha256(specification), hashlib.sha256(specification)
    for shard, length in zip(split.shards, split.lengths):
        try:
            stat = shard.stat()
        except OSError:
            raise UserError(f"{shard}: missing, though dataset_info.json counts it; copy it too") from None
        line = f"{shard.name} {stat.st_size} {length};"
        data.update(line.encode())
        files.update(f"{line}{stat.st_mtime_ns};".encode())
    return data.hexdigest()[:16], files.hexdigest()[:16]


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process makes the index, the others of a training wait for it."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written ({error.strerror}); set data.index to another folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(
    place: Path, split: Split, spec: Mapping[str, Feature], pictures: Sequence[str], texts: Sequence[str]
) -> None:
    parts = place / "parts"
    parts.mkdir(exist_ok=True)
    files = [parts / f"{shard.name}.npz" for shard in split.shards]
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
    shutil.rmtree(parts)


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
    arrays |= {f"texts/{name}": np.array(found, dtype=str) for name, found in words.items()}
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
        found.append(said[0] if said else "")
        counts[name] = len(said)
    if len(set(counts.values())) != 1:
        raise ValueError(f"its features have different numbers of steps: {counts}")
    return next(iter(counts.values()))


def _values(example: Mapping[str, Values], name: str, kind: int) -> Values:
    values = example.get(STEPS + name)
    if values is None:
        raise ValueError(f"has no feature {STEPS + name}")
    if values.kind != kind:
        raise ValueError(f"{STEPS + name} is of another type")
    return values


def read_texts(values: Values, data: bytes, feature: Feature) -> list[str]:
    """The text of each step. Character codes (Language Table) end with the first zero."""
    if feature.kind == "text":
        return [data[slice(*place)].decode(errors="replace") for place in values.bytes_places(data)]
    codes = values.ints(data).reshape(-1, feature.shape[0])
    return ["".join(map(chr, row[: np.argmin(np.append(row, 0) != 0)])) for row in codes]


def _merge(place: Path, files: Sequence[Path], pictures: Sequence[str], texts: Sequence[str]) -> None:
    """The parts as one set of arrays; pictures go to disk part by part."""
    episodes, words, frames = [], {name: [] for name in texts}, 0
    for number, file in enumerate(files):
        with np.load(file, allow_pickle=False) as part:
            steps = part["steps"]
            first = frames + np.cumsum(steps) - steps
            episodes.append(np.column_stack([np.full(len(steps), number), part["records"], first]))
            frames += int(steps.sum())
            for name in texts:
                words[name].extend(part[f"texts/{name}"].tolist())
    for name in pictures:
        array = np.lib.format.open_memmap(place / _file_of(name), "w+", np.int64, (frames, 2))
        at = 0
        for file in files:
            with np.load(file, allow_pickle=False) as part:
                found = part[f"pictures/{name}"]
            array[at : at + len(found)] = found
            at += len(found)
        array.flush()
    write_npy(place / EPISODES, np.concatenate(episodes).astype(np.int64))
    arrays = {}
    for name, said in words.items():
        distinct, ids = np.unique(np.array(said, dtype=str), return_inverse=True)
        arrays |= {f"texts/{name}": distinct, f"ids/{name}": ids.astype(np.int32)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_file(place / TEXTS, buffer.getvalue())


def write_npy(path: Path, array: np.ndarray) -> None:
    """An `.npy` file, there as a whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_file(path, buffer.getvalue())
