"""A data set of any format, written in LeRobot's format v3.0."""

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from defi.data.episode import Dataset, Episode, Frames
from defi.data.lerobot.meta import ROBOT, TASK
from defi.errors import UserError, choose
from defi.picture import encode_picture

os.environ.setdefault("SVT_LOG", "1")  # the encoder's errors alone
CODECS = {  # as LeRobot's, a key frame every other frame
    "av1": ("libsvtav1", {"g": "2", "crf": "30", "preset": "12", "svtav1-params": "lp=1"}),
    "h264": ("libx264", {"g": "2", "crf": "23", "bf": "0", "preset": "veryfast"}),
}
BLOCK = 32  # frames read at a time, and rows of a group: a random picture is unpacked with so many others
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEOS = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNK = 1000  # files in a folder
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _statistics(values: np.ndarray) -> dict[str, Any]:
    """Of numbers [N, size], exact."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    found |= {name: np.quantile(values, share, axis=0) for name, share in QUANTILES.items()}
    return {name: each.tolist() for name, each in found.items()} | {"count": [len(values)]}


def _picture_statistics(counts: Int64[np.ndarray, "3 256"], frames: int) -> dict[str, Any]:
    """Of pictures, exact, as shares of 1, from how often each channel has each value."""
    values, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ values / total
    below = counts.cumsum(1)
    found = {"mean": mean, "std": np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / total)}
    for name, share in {"min": 0, "max": 1, **QUANTILES}.items():
        found[name] = (below >= np.maximum(share * total, 1)[:, None]).argmax(1) / 255
    return {name: each.reshape(3, 1, 1).tolist() for name, each in found.items()} | {"count": [frames]}


@dataclass
class Files:
    """Files of one kind, one after the other: an episode begins another when there are `most` bytes.

    frames: in the current one.
    """

    folder: Path
    template: str
    key: str
    most: int
    number: int = 0
    frames: int = 0
    open: Any = None

    def begin(self) -> tuple[int, int]:
        """Of the file for the next episode: chunk and number in it."""
        path = self.path()
        if self.open is not None and (path.stat().st_size if path.exists() else 0) >= self.most:
            self.close()
            self.number, self.frames = self.number + 1, 0
        return divmod(self.number, CHUNK)

    def path(self) -> Path:
        chunk, file = divmod(self.number, CHUNK)
        path = self.folder / self.template.format(video_key=self.key, chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        if self.open is not None:
            self.open.close()
            self.open = None


class Video:
    """A file of one camera, frame by frame."""

    def __init__(self, path: Path, codec: str, fps: float, shape: tuple[int, ...]) -> None:
        name, options = CODECS[codec]
        self.container = av.open(str(path), "w")
        rate = Fraction(fps).limit_denominator(1001)
        self.stream = self.container.add_stream(name, rate=rate, options=dict(options))
        self.stream.height, self.stream.width, self.stream.pix_fmt = *shape[:2], "yuv420p"
        try:
            self.stream.codec_context.open()
        except av.FFmpegError as error:
            what = f"{shape[1]} x {shape[0]} pixels cannot be written as {codec} ({error.strerror})"
            raise UserError(f"{path}: {what}; pictures=images takes any size") from None

    def write(self, pictures: Frames) -> None:
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()


class LeRobotWriter:
    """Writes the episodes of a data set to a folder, one after the other.

    pictures: images (exact), or a name of `CODECS`. data_most, video_most: bytes of a file, at most by an
    episode more.

    Raises:
        UserError: what cannot be written so, or read.
    """

    forms = ("images", *CODECS)

    def __init__(
        self,
        dataset: Dataset,
        folder: Path,
        pictures: str = "images",
        data_most: int = 100 * 2**20,
        video_most: int = 200 * 2**20,
        robot_type: str = "unknown",
    ) -> None:
        choose("pictures", pictures, self.forms)
        self.dataset, self.folder, self.pictures, self.robot_type = dataset, folder, pictures, robot_type
        self.fps = dataset.rate(dataset.episode(0))
        self.keys = {camera: f"observation.images.{camera}" for camera in dataset.cameras}
        vectors = {"observation.state": dataset.state_names, "action": dataset.action_names}
        self.vectors = {key: list(names) for key, names in vectors.items() if names}
        columns = {key: IMAGE for key in self.keys.values() if pictures == "images"}
        for key, names in self.vectors.items():
            columns[key] = pa.list_(pa.float32(), len(names)) if len(names) > 1 else pa.float32()
        columns |= {name: pa.float32() if name == "timestamp" else pa.int64() for name in COUNTERS}
        self.schema = pa.schema(list(columns.items()))
        self.data = Files(folder, DATA, "", data_most)
        videos = self.keys if pictures != "images" else {}
        self.videos = {camera: Files(folder, VIDEOS, key, video_most) for camera, key in videos.items()}
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.features: dict[str, dict[str, Any]] = {}
        self.values: dict[str, list[np.ndarray]] = defaultdict(list)  # of all frames, without pictures
        self.counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((3, 256), np.int64))
        self.frames = 0
        self.splits: dict[str, tuple[int, int]] = {}  # of each the first episode, and the one after the last

    def add(self, episode: Episode, split: str = "train") -> None:
        """The next one; episodes of a split follow each other."""
        if (rate := self.dataset.rate(episode)) != self.fps:
            fix = "convert those of one rate (data.fps, data.split)"
            raise UserError(f"episode {episode.name}: {rate:g} frames per second, others {self.fps:g}; {fix}")
        values, length = self._columns(episode), episode.length
        texts = dict.fromkeys(text for _, text in episode.sentences())
        row = {"episode_index": len(self.rows), "tasks": list(texts), "length": length, TASK: episode.task}
        row["data/chunk_index"], row["data/file_index"] = self.data.begin()
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        for files in self.videos.values():
            what = f"videos/{files.key}"
            row[f"{what}/chunk_index"], row[f"{what}/file_index"] = files.begin()
            row[f"{what}/from_timestamp"] = files.frames / self.fps
            row[f"{what}/to_timestamp"] = (files.frames + length) / self.fps
            files.frames += length
        counts = {key: np.zeros((3, 256), np.int64) for key in self.keys.values()}
        for positions, stacks in self.dataset.blocks(episode, BLOCK):
            part = {name: _arrow(column[positions.start : positions.stop]) for name, column in values.items()}
            for camera, stack in stacks.items():
                key = self.keys[camera]
                self._check(key, stack)
                for channel in range(3):
                    counts[key][channel] += np.bincount(stack[..., channel].ravel(), minlength=256)
                if camera in self.videos:
                    files = self.videos[camera]
                    files.open = files.open or Video(files.path(), self.pictures, self.fps, stack.shape[1:])
                    files.open.write(stack)
                else:
                    part[key] = pa.array(
                        [{"bytes": encode_picture(each, "PNG"), "path": None} for each in stack], IMAGE
                    )
            self.data.open = self.data.open or pq.ParquetWriter(self.data.path(), self.schema)
            self.data.open.write_table(pa.table(part, self.schema))
        stats = {name: _statistics(column) for name, column in values.items()}
        stats |= {key: _picture_statistics(each, length) for key, each in counts.items()}
        row |= {f"stats/{key}/{name}": value for key, each in stats.items() for name, value in each.items()}
        self.rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        for name, column in values.items():
            self.values[name].append(column)
        for key, each in counts.items():
            self.counts[key] += each
        self.frames += length
        first, _ = self.splits.get(split, (len(self.rows) - 1, 0))
        self.splits[split] = first, len(self.rows)

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        """What an episode's rows hold beside pictures."""
        numbers, motions = np.arange(episode.length), self.dataset.motions if self.vectors else None
        texts = [episode.text(position) for position in range(episode.length)]
        for text in texts:
            self.tasks.setdefault(text, len(self.tasks))
        columns: dict[str, np.ndarray] = {
            "timestamp": (numbers / self.fps).astype(np.float32),
            "frame_index": numbers,
            "episode_index": np.full(episode.length, len(self.rows)),
            "index": self.frames + numbers,
            "task_index": np.array([self.tasks[text] for text in texts]),
        }
        for key in self.vectors:
            kept = motions.actions if key == "action" else motions.state
            columns[key] = kept[motions.rows(episode.start + numbers)]
        return columns

    def _check(self, key: str, stack: Frames) -> None:
        """Note a camera's pictures for info.json; those of one size alone can be written."""
        height, width = stack.shape[1:3]
        kind = "image" if self.pictures == "images" else "video"
        feature: dict[str, Any] = {
            "dtype": kind,
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if kind == "video":
            if height % 2 or width % 2:
                raise UserError(f"{key}: {width} x {height} pixels; videos need even sizes: pictures=images")
            info = {"height": height, "width": width, "codec": self.pictures, "pix_fmt": "yuv420p"}
            info |= {"fps": self.fps, "channels": 3, "is_depth_map": False}
            feature["info"] = {f"video.{name}": value for name, value in info.items()} | {"has_audio": False}
        if self.features.setdefault(key, feature) != feature:
            before = self.features[key]["shape"][:2]
            raise UserError(f"{key}: pictures of {before} and of {[height, width]}; bring them to one size")

    def close(self) -> None:
        """End all files and write what lies in meta/."""
        for files in (self.data, *self.videos.values()):
            files.close()
        meta = self.folder / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.rows), meta / "episodes/chunk-000/file-000.parquet")
        tasks = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        described = [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        ]
        pandas = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": described,
            "pandas_version": "2.2.3",
        }
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps(pandas)})  # LeRobot looks texts up by it
        pq.write_table(tasks, meta / "tasks.parquet")
        for key, names in self.vectors.items():
            self.features[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
        for name in COUNTERS:
            kind = "float32" if name == "timestamp" else "int64"
            self.features[name] = {"dtype": kind, "shape": [1], "names": None}
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self.rows),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": max(1, self.data.most // 2**20),
            "video_files_size_in_mb": max([1, *(files.most // 2**20 for files in self.videos.values())]),
            "fps": int(self.fps) if self.fps == int(self.fps) else self.fps,
            "splits": {name: f"{first}:{end}" for name, (first, end) in self.splits.items()},
            "data_path": DATA,
            "video_path": VIDEOS if self.videos else None,
            "features": self.features,
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        (self.folder / ROBOT).write_text(json.dumps(asdict(self.dataset.robot()), indent=4))
        stats = {name: _statistics(np.concatenate(each)) for name, each in self.values.items()}
        stats |= {key: _picture_statistics(each, self.frames) for key, each in self.counts.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))


def _arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1 or values.shape[1] == 1:
        return pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
