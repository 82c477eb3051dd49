"""Any frame of any episode of an RLDS data set, by number; and the index that says where each lies.

The index is made by one pass over a split's files, which checks all checksums and that every episode is what
the specification says. It lies in `<data set>/<version>/.defi` (`defi.engine.output.index_place`), or where
it is told to. For E episodes of N steps in all, P pictures and T texts per step:

    <data set>-<version>-<split>-<hash>/
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
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from rich.progress import track

from defi.archive import read_places
from defi.data.rlds.spec import (
    FEATURES,
    STEPS,
    Feature,
    Split,
    choose_split,
    files_of,
    find_version,
    read_metadata,
    read_spec,
    read_splits,
)
from defi.data.rlds.tfrecord import BYTES, FIX, INTS, NOTHING, Values, parse_example, read_records
from defi.engine.output import index_place, take_turn, write_file
from defi.errors import UserError, one_line, reading
from defi.files import read_json
from defi.instructions import is_utf8
from defi.npy import map_npy
from defi.picture import decode_picture, stack_frames
from defi.processes import print_once

# Where data sets keep their instruction, in order of preference.
LANGUAGE = ("language_instruction", "observation/natural_language_instruction", "observation/instruction")

ARRAYS, TEXTS = ("episodes", "pictures", "numbers"), "texts.json"
FORMAT = 4
READERS = 4  # files that are read at the same time

Features = Mapping[str, Feature]


def default_splits(folder: str | Path) -> tuple[str, str]:
    """Splits for training and for holding out: `val` where there is one, else the end of `train`.

    The end is 5 %. Of so few episodes that 5 % are none all serve for both, as the published code has it, and
    where there is nothing but `val` (Ego4D).
    """
    version = find_version(Path(folder))
    splits = read_splits(version)
    if "val" in splits:
        return "train" if "train" in splits else "val", "val"
    _, episodes = choose_split(version, splits, "train")
    enough = round(0.95 * len(episodes)) < len(episodes)
    return ("train[:95%]", "train[95%:]") if enough else ("train", "train")


class RLDSDataset:
    """One split, or a slice of it, of a TFDS folder of episodes; episodes in the order of its files.

    Args:
        folder: `<data set>/<version>`, or `<data set>`: its highest version.
        split: as TFDS names them: `train`, `train[:95%]`, `val[10:20]`.
        index: folder that keeps indices; None: `index_place`. The first opening of a split reads it once, and
            checks it all.

    Raises:
        UserError: what is missing or damaged is named with file and position.
    """

    def __init__(self, folder: str | Path, split: str = "train", *, index: str | Path | None = None) -> None:
        self.folder = find_version(Path(folder))
        self.name = self.folder.resolve().parent.name
        self.spec, self.metadata = read_spec(self.folder), read_metadata(self.folder)
        features = {path: f for path, f in self.spec.items() if path.startswith(STEPS)}
        pictures = [path for path, feature in features.items() if feature.is_picture]
        texts = {path: feature for path, feature in features.items() if feature.is_instruction(path)}
        if not pictures:
            raise UserError(f"{self.folder / FEATURES}: names no RGB pictures in its steps, to learn from")
        self.split, chosen = choose_split(self.folder, read_splits(self.folder), split)
        data, parts = _identify(self.folder, self.split)
        self.stamp = " ".join(parts)
        self.fingerprint = f"{data}-{split}"
        place = _make_index(self.folder, self.split, pictures, texts, index, parts)
        episodes, self._places, self._texts = _open_index(place, self.split, pictures, list(texts))
        self.first, part = chosen.start, slice(chosen.start, chosen.stop)
        steps = episodes[:, 2]
        self._files = np.repeat(np.arange(len(self.split.shards)), self.split.lengths)[part]
        self._records, self.firsts = episodes[part, :2], (steps.cumsum() - steps)[part]
        self.lengths = steps[
            part
        ].copy()  # in steps, the first of which have the numbers `firsts` in the split
        self.pictures = list(self._places)  # features that hold RGB pictures, as paths below `steps/`

    def __len__(self) -> int:
        """Episodes."""
        return len(self.lengths)

    def picture(self, key: str | None) -> str:
        """The feature that `key` means: itself, or within `observation`; None: the only one there is."""
        matching = [name for name in self.pictures if key in (None, name, name.removeprefix("observation/"))]
        if len(matching) != 1:
            listed = ", ".join(name.removeprefix("observation/") for name in self.pictures)
            raise UserError(f"{self.folder / FEATURES}: data.cameras={key}: choose one of {listed}")
        return matching[0]

    def language(self, key: str | None) -> str | None:
        """The feature that holds instructions: `key`, or for None the usual places; None if there is none.

        Texts in it that are not UTF-8 are printed.
        """
        if key is None:
            key = next((name for name in LANGUAGE if name in self._texts), None)
        elif key not in self._texts:
            found = ", ".join(self._texts) or "no text in its steps"
            raise UserError(f"{self.folder / FEATURES}: language={key}: there is {found}")
        if damaged := [text for text in self._texts[key][0] if not is_utf8(text)] if key else []:
            what = f"texts of {key} that are not UTF-8 count as missing ({len(damaged)}, as {damaged[0]!r})"
            print_once(f"{self.folder}: split {self.split.name}: {what}")
        return key

    def text(self, episode: int, language: str | None) -> str:
        """What a feature of text says at an episode's first step ("" for None)."""
        return next(iter(self.texts(episode, language, slice(1))), "")

    def texts(self, episode: int, language: str | None, steps: slice) -> tuple[str, ...]:
        """What a feature of text says at some steps of an episode; only once where all say the same."""
        if language is None:
            return ("",)
        distinct, numbers = self._texts[language]
        first = self.firsts[episode]
        found = numbers[first : first + self.lengths[episode]][steps]
        if len(found) and (found == found[0]).all():
            found = found[:1]
        return tuple(distinct[i] if is_utf8(distinct[i]) else "" for i in found)

    def labelled(self, language: str | None, trim: Sequence[int]) -> Bool[np.ndarray, " E"]:
        """Episodes with a text at any of their steps, the first `trim[0]` and the last `trim[1]` aside."""
        if language is None:
            return np.zeros(len(self), bool)
        distinct, numbers = self._texts[language]
        begin, end = self.firsts[0], self.firsts[-1] + self.lengths[-1]
        has_text = np.array([text != "" and is_utf8(text) for text in distinct], bool)[numbers[begin:end]]
        before = np.append(0, np.cumsum(has_text))  # texts before each step
        starts, ends = self.firsts - begin + trim[0], self.firsts - begin + self.lengths - trim[1]
        return before[ends.clip(0, end - begin)] > before[starts.clip(0, end - begin)]

    def shard(self, episode: int) -> Path:
        """The file that holds an episode."""
        return self.split.shards[self._files[episode]]

    def encoded(self, episode: int, steps: Sequence[int], picture: str) -> list[bytes]:
        """Pictures of some steps as they are stored (JPEG or PNG)."""
        rows = self.firsts[episode] + np.asarray(steps)
        return read_places(self.shard(episode), self._places[picture][rows].tolist())

    def frames(self, episode: int, steps: Sequence[int], picture: str) -> UInt8[np.ndarray, "N H W 3"]:
        """Pictures of some steps; nothing else is read or decoded."""
        places = [f"{self.shard(episode)}: episode {episode}, step {step}: {picture}" for step in steps]
        coded = self.encoded(episode, steps, picture)
        return stack_frames([decode_picture(*each) for each in zip(coded, places)], places)

    def values(self, episode: int, name: str) -> np.ndarray | list[str]:
        """A feature of all steps (say, `action`): an array [steps, ...], or a list of texts."""
        return self._values(episode, [name])[0]

    def vectors(self, episode: int, names: Sequence[str]) -> Float32[np.ndarray, "steps X"]:
        """Features of numbers of all steps, joined; the episode is read once."""
        found = self._values(episode, names)
        return np.concatenate([np.reshape(each, (len(each), -1)) for each in found], axis=1, dtype=np.float32)

    def _values(self, episode: int, names: Sequence[str]) -> list[np.ndarray | list[str]]:
        (data,) = read_places(self.shard(episode), [tuple(self._records[episode].tolist())])
        found: list[np.ndarray | list[str]] = []
        for name in names:
            feature = self.spec.get(STEPS + name)
            if feature is None or feature.kind not in ("tensor", "text"):
                kind = "missing" if feature is None else f"a {feature.kind}"
                where = f"{self.folder / FEATURES}: {STEPS}{name}"
                raise UserError(f"{where} is {kind}; tensors and text are read")
            with reading(f"{self.shard(episode)}: episode {episode}: {STEPS}{name}", FIX):
                values = parse_example(data)[STEPS + name]
                if feature.kind == "text":
                    found.append(_texts(values, data, feature))
                else:
                    shape = [self.lengths[episode], *(-1 if size is None else size for size in feature.shape)]
                    found.append(values.numbers(data).astype(feature.dtype).reshape(shape))
        return found


# ---------------------------------------------------------------- the index


def _identify(folder: Path, split: Split) -> tuple[str, list[str]]:
    """What identifies the data wherever they lie, and for each file what it is now, as a part's name."""
    specification = (folder / FEATURES).read_bytes()
    data, parts = hashlib.sha256(specification), []
    for shard, length in zip(split.shards, split.lengths):
        try:
            stat = shard.stat()
        except (OSError, ValueError):  # or its name is none
            there = [path.name for path in files_of(folder, split.name)]
            found = f"{len(there)} are there" + (f", the first {there[0]}" if there else "")
            counted = f"dataset_info.json counts {len(split.shards)} files of {split.name}"
            raise UserError(f"{shard}: missing; {counted}, {found}; copy all of them") from None
        line = os.fsencode(f"{shard.name} {stat.st_size} {length};")
        data.update(line)
        stamp = hashlib.sha256(b"%d %d;" % (FORMAT, stat.st_mtime_ns) + line + specification)
        parts.append(f"{shard.name}-{stamp.hexdigest()[:16]}.npz")
    return data.hexdigest()[:16], parts


def _make_index(
    folder: Path,
    split: Split,
    pictures: Sequence[str],
    texts: Features,
    cache: str | Path | None,
    parts: Sequence[str],
) -> Path:
    """The folder of a split's index, made if there is none of these very files (`parts`)."""
    name = "-".join([*folder.resolve().parts[-2:], split.name])
    own = f"{name}-{hashlib.sha256(os.fsencode(''.join(parts))).hexdigest()[:16]}"
    place = index_place(folder, own, TEXTS) if cache is None else Path(cache, own)
    if (place / TEXTS).is_file():
        return place
    files = [place.parent / f"{name}-parts" / part for part in parts]

    def make(file: Path, shard: Path, length: int) -> None:
        if not file.is_file():
            buffer = io.BytesIO()
            np.savez(buffer, **_scan(shard, length, pictures, texts))
            write_file(file, buffer.getvalue())

    try:
        with take_turn(place):  # one process makes it, the others of a training wait
            if (place / TEXTS).is_file():
                return place
            files[0].parent.mkdir(exist_ok=True)
            with ThreadPoolExecutor(READERS) as pool:
                made = pool.map(make, files, split.shards, split.lengths)
                list(track(made, f"index of {name}", total=len(files)))
            words: dict[str, dict[str, int]] = {path: {} for path in texts}
            for array in ARRAYS:
                found = [_read_part(file, array, words) for file in files]
                with (place / f"{array}.npy").open("wb") as output:
                    np.save(output, np.concatenate(found))
                    output.flush()
                    os.fsync(output.fileno())
            write_file(place / TEXTS, json.dumps({path: list(numbers) for path, numbers in words.items()}))
            for file in files:
                file.unlink()
            with suppress(OSError):  # parts of another version of the data
                files[0].parent.rmdir()
    except OSError as error:
        where, reason = error.filename or place, error.strerror or one_line(error)
        raise UserError(f"{where}: {reason}; free some space, or set data.index to another folder") from None
    return place


def _scan(shard: Path, expected: int, pictures: Sequence[str], texts: Features) -> dict[str, np.ndarray]:
    """One file's part of the index."""
    kinds = dict.fromkeys(pictures, BYTES)
    kinds |= {name: BYTES if feature.kind == "text" else INTS for name, feature in texts.items()}
    words: dict[str, dict[str, int]] = {name: {} for name in texts}
    episodes = [np.empty((0, 3), np.int64)]
    places, numbers = [np.empty((0, len(pictures), 2), np.int64)], [np.empty((0, len(texts)), np.int32)]
    for where, start, data in read_records(shard):
        with reading(where, f"the file and {FEATURES} do not belong together"):
            example = parse_example(data)
            for name, kind in kinds.items():
                if name not in example:
                    raise ValueError(f"has no feature {name}")
                if example[name].kind not in (NOTHING, kind):
                    raise ValueError(f"{name} is of another type")
            found = {name: example[name].places for name in pictures}
            for name, feature in texts.items():
                own = _texts(example[name], data, feature)
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


def _texts(values: Values, data: bytes, feature: Feature) -> list[str]:
    """The text of each step. Character codes (Language Table) end with the first zero."""
    if feature.kind == "text":
        coded = [data[start:end] for start, end in values.places]
        return [text.decode(errors="surrogateescape") for text in coded]  # what is not UTF-8 stays to be seen
    codes = values.numbers(data).reshape(-1, feature.shape[0])
    return ["".join(map(chr, row[: np.argmin(np.append(row, 0) != 0)])) for row in codes]


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


def _open_index(
    place: Path, split: Split, pictures: Sequence[str], texts: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, tuple[list[str], np.ndarray]]]:
    """Episodes [E, 3], places [N, 2] of each picture; distinct texts, and their numbers [N], of each text.

    Names are paths below `steps/`. That pictures lie in their files is seen when they are read.
    """
    with reading(place, "delete it, so that it is made again"):
        words = read_json(place / TEXTS, "delete its folder, so that it is made again")
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
    return (
        episodes,
        {name.removeprefix(STEPS): places[:, i] for i, name in enumerate(pictures)},
        {name.removeprefix(STEPS): (words[name], numbers[:, i]) for i, name in enumerate(texts)},
    )
