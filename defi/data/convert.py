"""Any data set as one in LeRobot's format v3.0, or in CALVIN's.

Actions and state are written as `Dataset.motions` has them, in float32 (CALVIN keeps float64). Each episode is
written by itself: annotated spans of CALVIN that share frames become episodes that share none, the name of the
task is kept (`lerobot.TASK`). Back in CALVIN's format each episode is a recording and a span, its frames
numbered anew; scene state and absolute actions, which this project does not read, are zeros there.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Int64
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.progress import track

from defi.config import entry
from defi.data import Dataset, Episode, open_dataset
from defi.data.calvin import FRAME, Span, encode_frame, frame_name, index_files
from defi.data.lerobot import TASK
from defi.engine.output import check_output, sync
from defi.errors import UserError, writing

os.environ.setdefault("SVT_LOG", "1")  # errors alone
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


def blocks(dataset: Dataset, episode: Episode) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
    """Pictures of an episode, a few at a time."""
    for first in range(0, episode.length, BLOCK):
        positions = range(first, min(first + BLOCK, episode.length))
        yield positions, dataset.read(episode, positions, dataset.cameras)


def statistics(values: np.ndarray) -> dict[str, Any]:
    """Of numbers [N, size], exact."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    found |= {name: np.quantile(values, share, axis=0) for name, share in QUANTILES.items()}
    return {name: each.tolist() for name, each in found.items()} | {"count": [len(values)]}


def picture_statistics(counts: Int64[np.ndarray, "3 256"], frames: int) -> dict[str, Any]:
    """Of pictures, exact, as shares of 1, from how often each channel has each value."""
    values, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / total)
    below = counts.cumsum(1)
    found = {"min": (below > 0).argmax(1) / 255, "max": (below == total[:, None]).argmax(1) / 255}
    found |= {"mean": mean, "std": std}
    for name, share in QUANTILES.items():
        found[name] = (below >= share * total[:, None]).argmax(1) / 255
    return {name: each.reshape(3, 1, 1).tolist() for name, each in found.items()} | {"count": [frames]}


@dataclass
class Video:
    """One camera's current file."""

    folder: Path
    key: str
    rate: Fraction
    codec: str
    most: int  # bytes, after which an episode begins another file
    number: int = 0
    frames: int = 0
    size: int = 0
    container: Any = None
    stream: Any = None

    def place(self) -> tuple[int, int]:
        return divmod(self.number, CHUNK)

    def begin(self) -> None:
        """An episode."""
        if self.size >= self.most:
            self.close()
            self.number, self.frames, self.size = self.number + 1, 0, 0

    def write(self, picture: np.ndarray) -> None:
        if self.container is None:
            chunk, file = self.place()
            path = self.folder / VIDEOS.format(video_key=self.key, chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            name, options = CODECS[self.codec]
            self.container = av.open(str(path), "w")
            self.stream = self.container.add_stream(name, rate=self.rate, options=dict(options))
            self.stream.height, self.stream.width = picture.shape[:2]
            self.stream.pix_fmt = "yuv420p"
        self._mux(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
        self.frames += 1

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self.stream.encode(frame):
            self.size += packet.size
            self.container.mux(packet)

    def close(self) -> None:
        if self.container is not None:
            self._mux(None)
            self.container.close()
            self.container = None


@dataclass
class LeRobotWriter:
    """Writes the episodes of a data set to a new folder, one after the other."""

    dataset: Dataset
    folder: Path
    pictures: str
    data_most: int
    video_most: int
    robot_type: str
    tasks: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    frames: int = 0
    number: int = 0  # of the current data file
    data: Any = None  # its writer

    def __post_init__(self) -> None:
        import pyarrow as pa

        self.fps = self.dataset.rate(self.dataset.episode(0))
        self.keys = {camera: f"observation.images.{camera}" for camera in self.dataset.cameras}
        self.vectors = {
            key: names
            for key, names in (
                ("observation.state", self.dataset.state_names),
                ("action", self.dataset.action_names),
            )
            if names
        }
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {key: image for key in self.keys.values() if self.pictures == "images"}
        for key, names in self.vectors.items():
            columns[key] = pa.list_(pa.float32(), len(names)) if len(names) > 1 else pa.float32()
        columns |= {name: pa.int64() if name != "timestamp" else pa.float32() for name in COUNTERS}
        self.schema = pa.schema(list(columns.items()))
        rate = Fraction(self.fps).limit_denominator(1001)
        most = self.video_most
        videos = self.keys if self.pictures != "images" else {}
        self.videos = {c: Video(self.folder, key, rate, self.pictures, most) for c, key in videos.items()}
        self.features: dict[str, dict[str, Any]] = {}

    def add(self, episode: Episode) -> None:
        import pyarrow as pa

        if (rate := self.dataset.rate(episode)) != self.fps:
            fix = "convert those of one rate (data.fps, data.split)"
            raise UserError(f"episode {episode.name}: {rate:g} frames per second, others {self.fps:g}; {fix}")
        number, length = len(self.rows), episode.length
        texts = [episode.text(position) for position in range(length)]
        for text in texts:
            self.tasks.setdefault(text, len(self.tasks))
        columns: dict[str, Any] = {
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(self.frames, self.frames + length),
            "task_index": np.array([self.tasks[text] for text in texts]),
        }
        if self.vectors:
            motions = self.dataset.motions
            rows = motions.rows(np.arange(episode.start, episode.start + length))
            for key in self.vectors:
                columns[key] = (motions.actions if key == "action" else motions.state)[rows]
        row = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(texts)),
            "length": length,
            TASK: episode.task,
        }
        chunk, file = divmod(self.number, CHUNK)
        row |= {"data/chunk_index": chunk, "data/file_index": file}
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        for video in self.videos.values():
            video.begin()
            chunk, file = video.place()
            row |= {f"videos/{video.key}/chunk_index": chunk, f"videos/{video.key}/file_index": file}
            row[f"videos/{video.key}/from_timestamp"] = video.frames / self.fps
            row[f"videos/{video.key}/to_timestamp"] = (video.frames + length) / self.fps
        counts = {key: np.zeros((3, 256), np.int64) for key in self.keys.values()}
        for positions, pictures in blocks(self.dataset, episode):
            part = {
                name: self._array(values[positions.start : positions.stop])
                for name, values in columns.items()
            }
            for camera, stack in pictures.items():
                key = self.keys[camera]
                self._check(key, stack)
                for channel in range(3):
                    counts[key][channel] += np.bincount(stack[..., channel].ravel(), minlength=256)
                if camera in self.videos:
                    for picture in stack:
                        self.videos[camera].write(picture)
                else:
                    coded = [{"bytes": png(picture), "path": None} for picture in stack]
                    part[key] = pa.array(coded, self.schema.field(key).type)
            self._write(pa.table(part, self.schema))
        stats = {name: statistics(values) for name, values in columns.items()}
        stats |= {key: picture_statistics(each, length) for key, each in counts.items()}
        row |= {f"stats/{key}/{name}": value for key, each in stats.items() for name, value in each.items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for key, each in counts.items():
            self.counts[key] = self.counts.get(key, 0) + each
        self.rows.append(row)
        self.frames += length
        if self.data_path().stat().st_size >= self.data_most:
            self._close_data()

    def data_path(self) -> Path:
        chunk, file = divmod(self.number, CHUNK)
        return self.folder / DATA.format(chunk_index=chunk, file_index=file)

    def _array(self, values: np.ndarray) -> Any:
        import pyarrow as pa

        if values.ndim == 1 or values.shape[1] == 1:
            return pa.array(values.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    def _check(self, key: str, stack: np.ndarray) -> None:
        shape = list(stack.shape[1:])
        kind = "image" if self.pictures == "images" else "video"
        feature = {"dtype": kind, "shape": shape, "names": ["height", "width", "channels"]}
        if kind == "video":
            if shape[0] % 2 or shape[1] % 2:
                raise UserError(
                    f"{key}: {shape[1]} x {shape[0]} pixels; videos need even sizes: pictures=images"
                )
            info = {"height": shape[0], "width": shape[1], "codec": self.pictures, "pix_fmt": "yuv420p"}
            info |= {"fps": self.fps, "channels": 3, "is_depth_map": False}
            feature["info"] = {f"video.{name}": value for name, value in info.items()} | {"has_audio": False}
        if self.features.setdefault(key, feature) != feature:
            before = self.features[key]["shape"]
            raise UserError(f"{key}: pictures of {before} and of {shape}; bring them to one size")

    def _write(self, table: Any) -> None:
        import pyarrow.parquet as pq

        if self.data is None:
            self.data_path().parent.mkdir(parents=True, exist_ok=True)
            self.data = pq.ParquetWriter(self.data_path(), self.schema, compression="snappy")
        self.data.write_table(table)

    def _close_data(self) -> None:
        if self.data is not None:
            self.data.close()
            self.data, self.number = None, self.number + 1

    def close(self) -> None:
        """End all files and write what lies in meta/."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._close_data()
        for video in self.videos.values():
            video.close()
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
        features = self.features | {
            key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
            for key, names in self.vectors.items()
        }
        for name in COUNTERS:
            kind = "float32" if name == "timestamp" else "int64"
            features[name] = {"dtype": kind, "shape": [1], "names": None}
        fps = int(self.fps) if self.fps == int(self.fps) else self.fps
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self.rows),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": max(1, self.data_most // 2**20),
            "video_files_size_in_mb": max(1, self.video_most // 2**20),
            "fps": fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": DATA,
            "video_path": VIDEOS if self.videos else None,
            "features": features,
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        (meta / "stats.json").write_text(json.dumps(self._statistics(), indent=4))

    def _statistics(self) -> dict[str, Any]:
        import pyarrow.parquet as pq

        files = sorted((self.folder / "data").rglob("*.parquet"))
        found = {key: picture_statistics(counts, self.frames) for key, counts in self.counts.items()}
        for key in (*self.vectors, *COUNTERS):
            parts = [pq.read_table(file, columns=[key])[key].to_numpy() for file in files]
            found[key] = statistics(np.stack(np.concatenate(parts)))
        return found


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_lerobot(
    dataset: Dataset,
    folder: Path,
    *,
    pictures: str = "images",
    data_mb: float = 100,
    video_mb: float = 200,
    robot_type: str = "unknown",
) -> None:
    """All episodes of a data set, in a new folder.

    Raises:
        UserError: what cannot be written so, or read.
    """
    if pictures not in ("images", *CODECS):
        raise UserError(f"pictures={pictures}: choose from images, {', '.join(CODECS)}")
    sizes = int(data_mb * 2**20), int(video_mb * 2**20)
    writer = LeRobotWriter(dataset, folder, pictures, *sizes, robot_type)
    for number in track(range(len(dataset)), "episodes", transient=True):
        writer.add(dataset.episode(number))
    writer.close()


def write_calvin(dataset: Dataset, folder: Path) -> None:
    """All episodes of a data set as one split in CALVIN's format; errors as `write_lerobot`."""
    needed = {
        "the camera static": "static" in dataset.cameras,
        "the camera gripper": "gripper" in dataset.cameras,
    }
    needed |= {
        "7 actions": len(dataset.action_names) == 7,
        "15 numbers of state": len(dataset.state_names) == 15,
    }
    if missing := [name for name, there in needed.items() if not there]:
        fix = "name what holds them (data.cameras=[static=…,gripper=…], data.actions, data.state)"
        raise UserError(f"{dataset.root}: CALVIN's format wants {', '.join(missing)}; {fix}")
    recordings, spans, first = [], [], 0
    zeros = {key: np.zeros(shape) for key, (kind, shape) in FRAME.items() if kind is not np.uint8}
    for number in track(range(len(dataset)), "episodes", transient=True):
        episode = dataset.episode(number)
        rows = dataset.motions.rows(np.arange(episode.start, episode.start + episode.length))
        actions, state = dataset.motions.actions[rows], dataset.motions.state[rows]
        for positions, pictures in blocks(dataset, episode):
            for place, position in enumerate(positions):
                frame = {f"rgb_{camera}": pictures[camera][place] for camera in ("static", "gripper")}
                own = {"rel_actions": actions[position], "robot_obs": state[position]}
                (folder / frame_name(first + position)).write_bytes(encode_frame({**zeros, **own, **frame}))
        recordings.append((first, first + episode.length - 1))
        for positions, text in episode.sentences():
            span = Span(first + positions.start, first + positions.stop - 1, text, episode.task or text)
            spans += [span] if text else []
        first += episode.length
    for name, content in index_files(recordings, spans, {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@entry("convert_data")
def main(cfg: DictConfig) -> None:
    if cfg.to not in ("lerobot", "calvin"):
        raise UserError(f"to={cfg.to}: choose lerobot or calvin")
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    section: Mapping[str, Any] = OmegaConf.to_container(cfg.data)  # type: ignore[assignment]
    dataset = open_dataset(section, cfg.part)
    partial = output.with_name(f".{output.name}.writing")  # appears complete
    with writing(output, "the data set"), ExitStack() as stack:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        if cfg.to == "calvin":
            write_calvin(dataset, partial)
        else:
            sizes = {"data_mb": cfg.data_mb, "video_mb": cfg.video_mb}
            write_lerobot(dataset, partial, pictures=cfg.pictures, robot_type=cfg.robot_type, **sizes)
        if output.is_dir():
            shutil.rmtree(output)
        partial.rename(output)
        sync(output.parent)
    print(f"{output}: {len(dataset)} episodes, {int(dataset.lengths.sum())} frames of {dataset.scope}")
    print("actions and state as float32")


if __name__ == "__main__":
    main()
