"""A data set of any format, written as RLDS in TFDS's layout, without TensorFlow.

<data set>/1.0.0/features.json, dataset_info.json, metadata.json, <name>-<split>.tfrecord-00000-of-00003

A record is one episode, a `tf.train.Example` whose features are named by their paths: those of `steps` hold
the values of all steps, one after the other. The features have the names that `data=rlds`, and most users of
Open X-Embodiment, look for. `reward` is 1 at the last step and 0 before it, `is_terminal` is true there,
whatever the data: episodes are taken for demonstrations that succeed.
"""

import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from defi.data.episode import Dataset, Episode
from defi.data.rlds.spec import FEATURES, INFO, METADATA, STEPS
from defi.data.rlds.tfrecord import BYTES, FLOATS, INTS, masked_crc
from defi.errors import UserError, choose
from defi.picture import encode_picture

VERSION = "1.0.0"
BLOCK = 32  # frames read at a time
FORMS = {"images": "PNG", "jpeg": "JPEG"}  # of the pictures
TFDS = "tensorflow_datasets.core"

# ---------------------------------------------------------------- messages and records


def varint(value: int) -> bytes:
    """Seven bits per byte, lowest first; negative numbers as 64 bits."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(number: int, payload: bytes) -> bytes:
    """A field of a message that holds bytes."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def feature(values: Sequence[Any] | np.ndarray) -> bytes:
    """A tf.train.Feature of strings, floats or integers."""
    if isinstance(values[0], bytes):
        return message(BYTES, b"".join(message(1, value) for value in values))
    values = np.asarray(values).ravel()
    if values.dtype.kind == "f":
        return message(FLOATS, message(1, values.astype("<f4").tobytes()))
    return message(INTS, message(1, b"".join(varint(int(value)) for value in values)))


def example(features: Mapping[str, Any]) -> bytes:
    """A tf.train.Example. features: path → values of all steps, or of the episode."""
    entries = [message(1, message(1, name.encode()) + message(2, feature(v))) for name, v in features.items()]
    return message(1, b"".join(entries))


def record(data: bytes) -> bytes:
    """As it stands in a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


# ---------------------------------------------------------------- features.json


def _class(name: str) -> dict[str, str]:
    return {"pythonClassName": f"{TFDS}.features.{name}"}


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    sizes = {"dimensions": [str(n) for n in shape]} if shape else {}
    return _class("tensor_feature.Tensor") | {"tensor": {"dtype": dtype, "encoding": "none", "shape": sizes}}


def image(height: int, width: int, form: str, channels: int = 3) -> dict[str, Any]:
    """form: png or jpeg."""
    sizes = {"dimensions": [str(height), str(width), str(channels)]}
    described = {"dtype": "uint8", "encodingFormat": form, "shape": sizes}
    return _class("image_feature.Image") | {"image": described}


def text() -> dict[str, Any]:
    return _class("text_feature.Text") | {"text": {}}


def features_dict(**features: Any) -> dict[str, Any]:
    return _class("features_dict.FeaturesDict") | {"featuresDict": {"features": features}}


def steps(**features: Any) -> dict[str, Any]:
    sequence = {"feature": features_dict(**features), "length": "-1"}
    return _class("dataset_feature.Dataset") | {"sequence": sequence}


def describe(folder: Path, name: str, features: Mapping[str, Any], splits: Sequence["Shards"]) -> None:
    """Write features.json (of an episode) and dataset_info.json."""
    (folder / FEATURES).write_text(json.dumps(features, indent=4, sort_keys=True))
    info = {"name": name, "version": VERSION, "fileFormat": "tfrecord"}
    info |= {"moduleName": f"{TFDS}.dataset_builders.adhoc_builder"}
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    listed = [
        {"filepathTemplate": template, "name": split.name, "numBytes": str(split.bytes)}
        | {"shardLengths": [str(length) for length in split.lengths]}
        for split in splits
    ]
    (folder / INFO).write_text(json.dumps(info | {"splits": listed}, indent=2, sort_keys=True))


# ---------------------------------------------------------------- the data set


@dataclass
class Shards:
    """Files of a split, one after the other: an episode begins another when there are `most` bytes.

    They get their names when all are there, for these hold their number. bytes: of all episodes.
    """

    folder: Path
    name: str
    most: float
    lengths: list[int] = field(default_factory=list)
    bytes: int = 0
    open: BinaryIO | None = None

    def add(self, data: bytes) -> None:
        if self.open is None or self.open.tell() >= self.most:
            self.begin()
        self.open.write(record(data))
        self.lengths[-1] += 1
        self.bytes += len(data)

    def begin(self) -> None:
        """Another file."""
        if self.open is not None:
            self.open.close()
        self.open = self._part(len(self.lengths)).open("wb")
        self.lengths.append(0)

    def close(self, dataset: str) -> None:
        if self.open is not None:
            self.open.close()
        total = len(self.lengths)
        for number in range(total):
            final = f"{dataset}-{self.name}.tfrecord-{number:05d}-of-{total:05d}"
            self._part(number).rename(self.folder / final)

    def _part(self, number: int) -> Path:
        return self.folder / f".{self.name}-{number:05d}.writing"


class RLDSWriter:
    """Writes the episodes of a data set to a folder, one after the other.

    folder: `<data set>`; the files go to a version below. name: of the data set. pictures: images (PNG,
    exact) or jpeg. most: bytes of a file, at most by an episode more.

    Raises:
        UserError: what cannot be written so, or read.
    """

    forms = tuple(FORMS)

    def __init__(
        self,
        dataset: Dataset,
        folder: Path,
        name: str,
        pictures: str = "images",
        most: float = 100 * 2**20,
    ) -> None:
        choose("pictures", pictures, self.forms)
        self.dataset, self.form = dataset, FORMS[pictures]
        self.folder, self.name = folder / VERSION, re.sub(r"\W+", "_", name).strip("_").lower() or "data"
        self.most = most
        self.splits: dict[str, Shards] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of each camera's pictures
        if "state" in dataset.cameras and dataset.state_names:
            raise UserError("a camera is called state, as is the robot's state; data.cameras=[name:state]")
        self.folder.mkdir(parents=True)

    def add(self, episode: Episode, split: str = "train") -> None:
        length, last = episode.length, np.arange(episode.length) == episode.length - 1
        if not length:
            raise UserError(f"episode {episode.name}: has no frame; leave it out (data.split)")
        found: dict[str, Any] = {"episode_metadata/file_path": [episode.name.encode()]}
        texts = [episode.text(position).encode() for position in range(length)]
        found[f"{STEPS}language_instruction"] = texts
        found[f"{STEPS}is_first"] = np.arange(length) == 0
        found[f"{STEPS}is_last"] = found[f"{STEPS}is_terminal"] = last
        found[f"{STEPS}reward"], found[f"{STEPS}discount"] = last.astype("f"), np.ones(length, "f")
        if self.dataset.action_names or self.dataset.state_names:
            motions = self.dataset.motions
            rows = motions.rows(episode.start + np.arange(length))
            if self.dataset.action_names:
                found[f"{STEPS}action"] = motions.actions[rows]
            if self.dataset.state_names:
                found[f"{STEPS}observation/state"] = motions.state[rows]
        coded: dict[str, list[bytes]] = defaultdict(list)
        for _, stacks in self.dataset.blocks(episode, BLOCK):
            for camera, stack in stacks.items():
                if self.shapes.setdefault(camera, stack.shape[1:]) != stack.shape[1:]:
                    sizes = [list(each[:2]) for each in (self.shapes[camera], stack.shape[1:])]
                    fault = f"pictures of {sizes[0]} and of {sizes[1]}; bring them to one size"
                    raise UserError(f"{camera}: {fault}")
                coded[camera] += [encode_picture(each, self.form) for each in stack]
        found |= {f"{STEPS}observation/{camera}": pictures for camera, pictures in coded.items()}
        self.splits.setdefault(split, Shards(self.folder, split, self.most)).add(example(found))

    def close(self) -> None:
        """End all files and say what is in them."""
        data, form = self.dataset, self.form.lower()
        observation = {camera: image(*shape[:2], form) for camera, shape in self.shapes.items()}
        if data.state_names:
            observation["state"] = tensor("float32", len(data.state_names))
        numbers = {name: tensor("bool") for name in ("is_first", "is_last", "is_terminal")}
        numbers |= {name: tensor("float32") for name in ("reward", "discount")}
        if data.action_names:
            numbers["action"] = tensor("float32", len(data.action_names))
        features = features_dict(
            episode_metadata=features_dict(file_path=text()),
            steps=steps(observation=features_dict(**observation), language_instruction=text(), **numbers),
        )
        for shards in self.splits.values():
            shards.close(self.name)
        names = {"action": list(data.action_names), "observation/state": list(data.state_names)}
        said = {"fps": data.fps, "cameras": list(data.cameras), "names": names, "robot": asdict(data.robot())}
        (self.folder / METADATA).write_text(json.dumps(said, indent=4))
        describe(self.folder, self.name, features, list(self.splits.values()))
