"""What a TFDS folder says of itself: `features.json` and `dataset_info.json`.

<data set>/<version>/features.json        names, types and shapes, nested: an episode's metadata and steps
                     dataset_info.json    splits: their files and how many episodes each holds
                     <name>-<split>.tfrecord-00000-of-00003
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defi.errors import UserError
from defi.files import read_json

STEPS = "steps/"
FEATURES, INFO = "features.json", "dataset_info.json"
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMBERS = ("bool", *INTEGERS, "float16", "float32", "float64")
MEND = "copy the data set again"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True)
class Feature:
    """One leaf of the specification. kind: image, text, tensor, or what it is called where it is not read.

    shape: of one value (of a step, for a feature of steps); None where it varies.
    """

    kind: str
    dtype: str = ""
    shape: tuple[int | None, ...] = ()

    @property
    def is_picture(self) -> bool:
        """Whether it is an RGB picture (a depth map, say, is not)."""
        return self.kind == "image" and self.shape[-1:] == (3,) and self.dtype in ("", "uint8", "uint16")


@dataclass(frozen=True)
class Split:
    """Files of a split in order, and the number of episodes in each."""

    name: str
    shards: list[Path]
    lengths: list[int]

    @property
    def episodes(self) -> int:
        return sum(self.lengths)


def find_version(folder: Path) -> Path:
    """The folder that holds features.json: `folder` itself, or its highest version.

    Raises:
        UserError: there is none.
    """
    if (folder / FEATURES).is_file():
        return folder
    versions = [
        p.parent for p in folder.glob(f"*/{FEATURES}") if re.fullmatch(r"\d+\.\d+\.\d+", p.parent.name)
    ]
    if not versions:
        raise UserError(
            f"{folder}: no {FEATURES} here or in a version below it (1.0.0, say); "
            f"give the folder of an RLDS data set as TFDS writes it"
        )
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))


def read_spec(folder: Path) -> dict[str, Feature]:
    """Leaves of features.json by path ("steps/observation/image").

    Raises:
        UserError: the file is missing or is no specification of recordings in steps.
    """
    file = folder / FEATURES
    try:
        spec = dict(_leaves(read_json(file, MEND), ""))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a TFDS specification ({error!r}); {MEND}") from None
    if not any(path.startswith(STEPS) for path in spec):
        raise UserError(f"{file}: has no feature `steps`, so this is no data set of episodes (RLDS)")
    return spec


def _leaves(node: Mapping[str, Any], path: str, *, sequences: int = 0) -> Iterator[tuple[str, Feature]]:
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            yield from _leaves(child, f"{path}/{name}" if path else name, sequences=sequences)
    elif "sequence" in node:
        yield from _leaves(node["sequence"]["feature"], path, sequences=sequences + 1)
    elif sequences > 1:
        yield path, Feature("sequence within a step")
    else:
        yield path, _leaf(node)


def _leaf(node: Mapping[str, Any]) -> Feature:
    for kind in ("image", "tensor"):
        if kind in node:
            shape = tuple(_size(n) for n in node[kind].get("shape", {}).get("dimensions", ()))
            dtype = node[kind].get("dtype", "")
            if kind == "tensor" and node[kind].get("encoding", "none").lower() not in ("none", ""):
                return Feature("compressed tensor", dtype, shape)
            if dtype == "string":
                return Feature("text", dtype, shape)
            if kind == "tensor" and dtype not in NUMBERS:
                return Feature(f"tensor of type {dtype!r}", "", shape)
            return Feature(kind, dtype, shape)
    if "text" in node:
        return Feature("text", "string")
    if "classLabel" in node:
        return Feature("tensor", "int64")
    return Feature(str(node["pythonClassName"]).rpartition(".")[2])


def _size(dimension: str) -> int | None:
    return None if int(dimension) < 0 else int(dimension)


def is_instruction(path: str, feature: Feature) -> bool:
    """Whether a feature can hold what a step is about: text, or Language Table's array of character codes."""
    if not path.startswith(STEPS):
        return False
    codes = feature.kind == "tensor" and feature.dtype in INTEGERS and len(feature.shape) == 1
    return (feature.kind == "text" and feature.shape == ()) or (codes and path.endswith("/instruction"))


def read_splits(folder: Path) -> dict[str, Split]:
    """The splits by name.

    Raises:
        UserError: the file is missing, or the data are not TFRecords.
    """
    file = folder / INFO
    info = read_json(file, MEND)
    try:
        if (form := info.get("fileFormat", "tfrecord")) != "tfrecord":
            raise UserError(f"{file}: the data are in files of type {form}; only tfrecord is read")
        return {split["name"]: _split(folder, info["name"], split) for split in info["splits"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not what TFDS writes ({error!r}); {MEND}") from None


def _split(folder: Path, dataset: str, split: Mapping[str, Any]) -> Split:
    said = split["shardLengths"]
    lengths = [int(n) for n in (said if isinstance(said, list) else [said])]
    template = split.get("filepathTemplate") or TEMPLATE
    shards = []
    for i in range(len(lengths)):
        values = {"DATASET": dataset, "SPLIT": split["name"], "FILEFORMAT": "tfrecord"}
        values |= {"SHARD_INDEX": f"{i:05d}", "NUM_SHARDS": f"{len(lengths):05d}"}
        values["SHARD_X_OF_Y"] = f"{values['SHARD_INDEX']}-of-{values['NUM_SHARDS']}"
        shards.append(folder / Path(_filled(template, values)).name)
    if not all(map(os.path.isfile, shards)):
        there, filled = record_files(folder, split["name"]), [n for n in lengths if n > 0]
        if len(there) == len(filled):  # files without episodes may be left out; each one's number is checked
            shards, lengths = there, filled
    return Split(split["name"], shards, lengths)


def record_files(folder: Path, split: str) -> list[Path]:
    """Files that are named as those of a split, whatever data set and number of files the names tell."""
    name = re.compile(rf"([^.].*-)?{re.escape(split)}\.tfrecord.*")
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name))


def _filled(template: str, values: Mapping[str, str]) -> str:
    """A file's name; `str.format` would also obey widths and look into objects."""
    return re.sub(r"{(\w+)}", lambda match: values[match[1]], template)


SLICE = re.compile(r"(?P<name>[^\[\]]+?)(?:\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?")


def choose_split(folder: Path, splits: Mapping[str, Split], wanted: str) -> tuple[Split, range]:
    """A split and the episodes of it that `train`, `train[:95%]`, `val[10:20]` or `train[-100:]` names.

    Raises:
        UserError: there is no such split, or nothing is left of it.
    """
    match = SLICE.fullmatch(wanted)
    if match is None or match["name"] not in splits:
        there = ", ".join(splits) or "no splits"
        raise UserError(f"{folder}: split {wanted!r}: this data set has {there}; slices as in train[:95%]")
    split = splits[match["name"]]
    low, high = (_boundary(match[end], split.episodes) for end in ("low", "high"))
    episodes = range(split.episodes)[slice(low, high)]
    if not episodes:
        raise UserError(
            f"{folder}: split {wanted!r}: is empty, {match['name']} has {split.episodes} episodes"
        )
    return split, episodes


def _boundary(text: str | None, episodes: int) -> int | None:
    """An episode's number; per cent are rounded to the nearest episode, as TFDS does."""
    if text is None:
        return None
    return round(int(text[:-1]) * episodes / 100) if text.endswith("%") else int(text)
