"""What a TFDS folder says of itself: `features.json` and `dataset_info.json`.

<data set>/<version>/features.json        names, types and shapes, nested: an episode's metadata and steps
                     dataset_info.json    splits: their files and how many episodes each holds
                     metadata.json        free to the writer; of ours, what the others have no place for
                     <name>-<split>.tfrecord-00000-of-00003
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from defi.config import typed
from defi.errors import UserError, reading
from defi.files import read_json

STEPS = "steps/"
FEATURES, INFO, METADATA = "features.json", "dataset_info.json", "metadata.json"
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMBERS = ("bool", *INTEGERS, "float16", "float32", "float64")
FIX = "copy the data set again"
SLICE = re.compile(r"(?P<name>[^\[\]]+?)(?:\[(?P<low>-?\d+%?)?:(?P<high>-?\d+%?)?\])?")


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

    def is_instruction(self, path: str) -> bool:
        """Whether it can hold what a step is about: text, or Language Table's array of character codes."""
        codes = self.kind == "tensor" and self.dtype in INTEGERS and len(self.shape) == 1
        return (self.kind == "text" and self.shape == ()) or (codes and path.endswith("/instruction"))


@dataclass
class Metadata:
    """What a data set written here says besides. fps: frames per second; None: unknown, or recordings differ.

    cameras: in order. names: of the numbers in a feature, by its path below `steps/`. robot: whose
    `action` and `observation/state` they are (`defi.robot.spec`); None: nobody says.
    """

    fps: float | None = None
    cameras: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    robot: dict[str, Any] | None = None


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
    """The folder that holds features.json: `folder` itself, or its highest version."""
    if (folder / FEATURES).is_file():
        return folder
    found = [path.parent for path in folder.glob(f"*/{FEATURES}")]
    versions = [path for path in found if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    if not versions:
        raise UserError(f"{folder}: no {FEATURES} here or in a version below; give a folder that TFDS wrote")
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))))


def read_spec(folder: Path) -> dict[str, Feature]:
    """Leaves of features.json by path ("steps/observation/image")."""
    file = folder / FEATURES
    with reading(file, FIX):
        return dict(_leaves(read_json(file, FIX), ""))


def read_metadata(folder: Path) -> Metadata:
    """Of another writer, who may mean anything by it, nothing is taken."""
    if not (file := folder / METADATA).is_file():
        return Metadata()
    said = read_json(file, FIX)
    if not isinstance(said, dict) or {*said, "robot"} != {each.name for each in fields(Metadata)}:
        return Metadata()
    found = typed(Metadata, said, str(file))
    if found.fps is not None and not 0 < found.fps < 1000:
        raise UserError(f"{file}: fps={found.fps}: must be a rate above 0 and below 1000; {FIX}")
    return found


def _leaves(node: Mapping[str, Any], path: str, *, sequences: int = 0) -> Iterator[tuple[str, Feature]]:
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            yield from _leaves(child, f"{path}/{name}" if path else name, sequences=sequences)
    elif "sequence" in node:
        yield from _leaves(node["sequence"]["feature"], path, sequences=sequences + 1)
    else:
        yield path, _leaf(node) if sequences <= 1 else Feature("sequence within a step")


def _leaf(node: Mapping[str, Any]) -> Feature:
    if "text" in node:
        return Feature("text", "string")
    if "classLabel" in node:
        return Feature("tensor", "int64")
    kind = "image" if "image" in node else "tensor"
    if kind not in node:
        return Feature(str(node["pythonClassName"]).rpartition(".")[2])
    given = node[kind]
    dtype, encoding = given.get("dtype", ""), given.get("encoding", "none").lower()
    sizes = [int(size) for size in given.get("shape", {}).get("dimensions", ())]
    if kind == "tensor" and encoding not in ("none", ""):
        kind = "compressed tensor"
    elif dtype == "string":
        kind = "text"
    elif kind == "tensor" and dtype not in NUMBERS:
        kind = f"tensor of type {dtype!r}"
    return Feature(kind, dtype, tuple(None if size < 0 else size for size in sizes))


def read_splits(folder: Path) -> dict[str, Split]:
    """The splits by name. Raises UserError: the file is missing, or the data are not TFRecords."""
    file = folder / INFO
    info = read_json(file, FIX)
    with reading(file, FIX):
        if (form := info.get("fileFormat", "tfrecord")) != "tfrecord":
            raise UserError(f"{file}: the data are in files of type {form}; only tfrecord is read")
        splits = {}
        for name, given in ((split["name"], split["shardLengths"]) for split in info["splits"]):
            lengths = [int(n) for n in (given if isinstance(given, list) else [given])]
            stem, total = Path(f"{info['name']}-{name}.tfrecord").name, len(lengths)
            shards = [folder / f"{stem}-{i:05d}-of-{total:05d}" for i in range(total)]
            if not all(shard.is_file() for shard in shards):
                there, filled = files_of(folder, name), [n for n in lengths if n > 0]
                if len(there) == len(filled):  # those without episodes may be left out; the rest are counted
                    shards, lengths = there, filled
            splits[name] = Split(name, shards, lengths)
        return splits


def files_of(folder: Path, split: str) -> list[Path]:
    """Files that are named as those of a split, of whatever data set and number of files."""
    name = re.compile(rf"([^.].*-)?{re.escape(split)}\.tfrecord.*")
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name))


def choose_split(folder: Path, splits: Mapping[str, Split], wanted: str) -> tuple[Split, range]:
    """A split and the episodes of it that `train`, `train[:95%]`, `val[10:20]` or `train[-100:]` names.

    Per cent are rounded to the nearest episode, as TFDS does.
    """
    match = SLICE.fullmatch(wanted)
    if match is None or match["name"] not in splits:
        there = ", ".join(splits) or "no splits"
        raise UserError(f"{folder}: split {wanted!r}: this data set has {there}; slices as in train[:95%]")
    split = splits[match["name"]]

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * split.episodes / 100) if text.endswith("%") else int(text)

    episodes = range(split.episodes)[slice(bound(match["low"]), bound(match["high"]))]
    if not episodes:
        raise UserError(f"{folder}: split {wanted!r} is empty: {split.name} has {split.episodes} episodes")
    return split, episodes
