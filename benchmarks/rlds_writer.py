"""Made-up RLDS data sets in TFDS's layout, for benchmarks and tests; the bytes follow the formats' rules."""

import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defi.data.rlds.tfrecord import masked_crc


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def feature(values: Sequence[Any] | np.ndarray) -> bytes:
    """A tf.train.Feature of strings, floats or integers."""
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    values = np.asarray(values).ravel()
    if values.dtype.kind == "f":
        return field(2, field(1, values.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value)) for value in values)))


def example(features: Mapping[str, Any]) -> bytes:
    entries = [field(1, field(1, name.encode()) + field(2, feature(v))) for name, v in features.items()]
    return field(1, b"".join(entries))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def encode(picture: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form, **({"quality": 95} if form == "JPEG" else {}))
    return buffer.getvalue()


def _class(name: str) -> dict[str, str]:
    return {"pythonClassName": f"tensorflow_datasets.core.features.{name}"}


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    sizes = {"dimensions": [str(n) for n in shape]} if shape else {}
    return _class("tensor_feature.Tensor") | {"tensor": {"dtype": dtype, "encoding": "none", "shape": sizes}}


def image(height: int, width: int, form: str, channels: int = 3) -> dict[str, Any]:
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


def write_set(
    root: Path,
    step_features: Mapping[str, Any],
    splits: Mapping[str, Sequence[Iterable[Mapping[str, Any]]]],
    *,
    name: str = "toy",
    beside: Mapping[str, Any] | None = None,
) -> Path:
    """A data set root/name/1.0.0. step_features: its specification. splits: the examples of each shard.

    beside: features of an episode beside its steps; None: its file_path. Returns root/name.
    """
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    beside = beside or {"episode_metadata": features_dict(file_path=text())}
    described = features_dict(**beside, steps=steps(**step_features))
    (folder / "features.json").write_text(json.dumps(described))
    listed = []
    for split, shards in splits.items():
        lengths = []
        for i, episodes in enumerate(shards):
            file = folder / f"{name}-{split}.tfrecord-{i:05d}-of-{len(shards):05d}"
            records = [record(example(episode)) for episode in episodes]
            file.write_bytes(b"".join(records))
            lengths.append(str(len(records)))
        listed.append({"name": split, "shardLengths": lengths})
    info = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": listed}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return root / name


def write_videos(
    root: Path, splits: Mapping[str, Sequence[Sequence[int]]], *, name: str = "toy", size: int = 48
) -> Path:
    """Episodes of these lengths, with an instruction and a camera whose pictures show episode and step."""

    def episode(number: int, length: int) -> dict[str, Any]:
        frames = np.zeros((length, size, size, 3), np.uint8)
        frames[..., 0], frames[..., 1] = 10 * number, 8 * np.arange(length)[:, None, None]
        return {
            "episode_metadata/file_path": [f"/{number}".encode()],
            "steps/observation/image": [encode(frame, "PNG") for frame in frames],
            "steps/observation/depth": [encode(frame[..., 0], "PNG") for frame in frames],
            "steps/language_instruction": [f"do thing {number}".encode()] * length,
            "steps/action": np.arange(length * 7, dtype=np.float32) - number,
            "steps/is_last": [int(i == length - 1) for i in range(length)],
            "steps/reward": np.zeros(length, np.float32),
        }

    numbers = iter(range(1000))
    written = {
        split: [[episode(next(numbers), length) for length in shard] for shard in shards]
        for split, shards in splits.items()
    }
    observation = features_dict(image=image(size, size, "png"), depth=image(size, size, "png", channels=1))
    return write_set(
        root,
        {
            "observation": observation,
            "language_instruction": text(),
            "action": tensor("float32", 7),
            "is_last": tensor("bool"),
            "reward": tensor("float32"),
        },
        written,
        name=name,
    )
