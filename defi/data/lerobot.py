"""LeRobot's data sets, versions 2.1 and 3.0, read without LeRobot.

    meta/info.json       version, fps, features, templates of the paths
    meta/tasks.*         the instructions by number; each frame names its own
    meta/episodes*       of each episode its length and, since 3.0, its files and where in them it lies
    data/**.parquet      a row per frame: actions, state, time, number of the instruction, pictures perhaps
    videos/**.mp4        one camera; frame n is shown n / fps seconds after the first

Since 3.0 a file holds many episodes, and each camera is split into files of its own. All files are checked
when a data set is opened for the first time, which leaves an index of the instructions:

    <root>/.defi/lerobot-<hash>/tasks.npy   int32 [frames]: number of each frame's instruction
                                done        written last
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.progress import track

from defi.data.episode import Dataset, DataSettings, Episode, Frames, Part, of_part
from defi.engine.output import index_place, take_turn, write_file
from defi.errors import UserError, reading, writing
from defi.files import read_json, read_text
from defi.instructions import read_instruction
from defi.npy import map_npy
from defi.picture import decode_picture, stack_frames
from defi.video import timed_video

FIX = "copy the data set again"
VERSIONS = ("v2.1", "v3.0")
TASK = "defi/task"  # a column of ours in the table of episodes: `Episode.task`
DONE, READERS = "done", 4
FIELD = re.compile(r"\{(\w+)(?::(0?\d{1,2}d))?\}")  # of a path, "{chunk_index:03d}"
SLICE = re.compile(r"(\d+)?(%)?:(\d+)?(%)?")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PLACES = (
    "episode_index",
    "length",
    "data/",
    "videos/",
    TASK,
)  # columns of the table of episodes; others wait
MOST_EPISODES, MOST_FRAMES = 10**7, 10**10
LARGEST_GROUP = 2**31  # bytes of a column of one row group, unpacked
GROUPS = 8  # row groups that a process keeps


@dataclass(kw_only=True)
class Settings(DataSettings):
    """split, held_out: a range of episodes ("0:90", "90%:"), or one of info.json's names for them.

    actions, state: the features that hold them; those of these names may be missing.
    """

    actions: str | None = "action"
    state: str | None = "observation.state"

    def open(self, part: Part) -> "LeRobotData":
        root = find_root(self.root)
        info = read_json(
            root / "meta/info.json", "give the folder of a LeRobot data set (with meta/info.json)"
        )
        everything = range(len(read_episodes(root, info)["length"]))
        split, held_out = (_range(each, info, everything) for each in (self.split, self.held_out))
        if part == "all":
            chosen = everything if split is None else split
        elif split is None and held_out is None:
            chosen = of_part(everything, part)
        elif part == "held_out":
            chosen = held_out if held_out is not None else [n for n in everything if n not in split] or split
        else:
            chosen = split if split is not None else [n for n in everything if n not in held_out] or held_out
        return LeRobotData(root, list(chosen), self)


def find_root(root: str) -> Path:
    """The data set's folder; one of the hub is downloaded to its cache, or found there."""
    name = root.removeprefix("hf://").removeprefix("datasets/")
    if Path(root).is_dir() or not HUB_NAME.fullmatch(name):
        if not Path(root).is_dir():
            raise UserError(f"{root}: no such folder; give a LeRobot data set, or hf://user/name of the hub")
        return Path(root)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with reading(root, "check the name of the data set and the connection, or give a folder"):
        try:
            return Path(snapshot_download(name, repo_type="dataset"))
        except LocalEntryNotFoundError:
            raise ValueError("neither in the hub's cache nor to be had from the hub") from None


def _range(text: str | None, info: dict[str, Any], everything: range) -> range | None:
    """The episodes that a split names."""
    if text is None:
        return None
    named = info.get("splits") or {}
    found = SLICE.fullmatch(str(named.get(text, text)).strip("[]"))
    if not found:
        raise UserError(f"data.split={text}: give a range of episodes, 0:90 say, or one of {list(named)}")
    ends = [
        None if not n else int(n) * len(everything) // 100 if percent else int(n)
        for n, percent in (found.groups()[:2], found.groups()[2:])
    ]
    if not (chosen := everything[slice(*ends)]):
        raise UserError(
            f"data.split={text}: holds none of the {len(everything)} episodes; give another range"
        )
    return chosen


# ---------------------------------------------------------------- what the files in meta/ say


def read_episodes(root: Path, info: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of all episodes, in order: `length`, and since 3.0 the columns with their files and places in them."""
    where = root / "meta/info.json"
    if (version := info.get("codebase_version")) not in VERSIONS:
        fix = "convert it with LeRobot (lerobot.scripts.convert_dataset_…)"
        raise UserError(f"{where}: version {version}; {' and '.join(VERSIONS)} can be read: {fix}")
    if version == "v2.1":
        file = root / "meta/episodes.jsonl"
        rows = read_lines(file)
        with reading(file, FIX):
            columns = {key: np.array([row[key] for row in rows]) for key in ("episode_index", "length")}
    else:
        file = root / "meta/episodes"
        parts = []
        for each in sorted(file.glob("*/*.parquet")):
            with reading(each, FIX):
                names = [name for name in parquet(each).schema_arrow.names if name.startswith(PLACES)]
                parts.append(read_table(each, names))
        if not parts:
            raise UserError(f"{file}: no table of the episodes in it; {FIX}")
        with reading(file, FIX):
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    with reading(file, FIX):
        order = np.argsort(columns["episode_index"], kind="stable")
        columns = {name: column[order] for name, column in columns.items()}
        lengths = columns["length"] = columns["length"].astype(np.int64)
        if not np.array_equal(columns["episode_index"], np.arange(len(order))) or len(order) == 0:
            raise ValueError("its episodes are not numbered 0, 1, …")
        if not ((lengths > 0) & (lengths < MOST_FRAMES // MOST_EPISODES)).all():
            number = int(np.argmin((lengths > 0) & (lengths < MOST_FRAMES // MOST_EPISODES)))
            raise ValueError(f"episode {number} has {lengths[number]} frames")
    return columns


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one in each line."""
    with reading(file, FIX):
        rows = [json.loads(line) for line in read_text(file, FIX).splitlines() if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("holds lines that are no objects")
        return rows


def read_tasks(root: Path, version: str) -> dict[int, str]:
    """Number → instruction."""
    file = root / ("meta/tasks.jsonl" if version == "v2.1" else "meta/tasks.parquet")
    if version == "v2.1":
        rows = [(row.get("task_index"), row.get("task")) for row in read_lines(file)]
    else:
        with reading(file, FIX):
            names = parquet(file).schema_arrow.names  # pandas keeps the texts as an index, named or not
            text = next(name for name in ("task", "__index_level_0__", *names) if name in names)
            table = read_table(file, ["task_index", text])
            rows = list(zip(table["task_index"].tolist(), table[text].tolist()))
    if faults := [number for number, _ in rows if type(number) is not int]:
        raise UserError(f"{file}: {faults[0]!r} is no number of a task; {FIX}")
    return {number: read_instruction(text, f"{file}: task {number}") for number, text in rows}


# ---------------------------------------------------------------- Parquet


def parquet(file: Path) -> Any:
    """An open file. UserError if it is none, or a column of it is too large for the memory."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("data.format=lerobot: needs the package pyarrow; pip install pyarrow") from None
    with reading(file, FIX):
        if not file.is_file():
            raise FileNotFoundError
        found = pq.ParquetFile(file)
        meta, size = found.metadata, file.stat().st_size
        for group in range(meta.num_row_groups):
            unpacked = meta.row_group(group).total_byte_size
            if unpacked > LARGEST_GROUP or meta.row_group(group).num_rows > max(2**20, 2**10 * size):
                raise ValueError(f"row group {group} has {unpacked:,} bytes")
        return found


def read_table(file: Path, names: Sequence[str], group: int | None = None) -> dict[str, np.ndarray]:
    """Columns of a file, or of one row group; vectors as [N, size], pictures as dicts with their bytes."""
    with reading(file, FIX):
        opened = parquet(file)
        there = opened.schema_arrow.names
        if missing := [name for name in names if name not in there]:
            raise ValueError(f"has no column {missing[0]}, but {', '.join(there[:20])}")
        table = opened.read(names) if group is None else opened.read_row_group(group, names)
        return {name: _column(table[name], name) for name in names}


def _column(column: Any, name: str) -> np.ndarray:
    import pyarrow as pa

    kind = column.type
    if column.null_count:
        raise ValueError(f"{name}: {column.null_count} values are missing")
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        flat = column.flatten()  # of these rows only
        if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
            return np.array(column.to_pylist(), object)
        if flat.null_count or len(column) and len(flat) % len(column):
            raise ValueError(f"{name}: its rows are not all of one length")
        sizes = {len(row) for row in (column[0], column[-1])} if len(column) else {0}
        if len(sizes) > 1 or len(column) and len(flat) != len(column) * min(sizes):
            raise ValueError(f"{name}: its rows are not all of one length")
        return flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return column.to_numpy(zero_copy_only=False)


@lru_cache(maxsize=GROUPS)
def _group(file: Path, names: tuple[str, ...], group: int, changed: int) -> dict[str, np.ndarray]:
    return read_table(file, names, group)


@lru_cache(maxsize=1024)
def _group_starts(file: Path, changed: int) -> tuple[int, ...]:
    meta = parquet(file).metadata
    sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    return tuple(np.cumsum([0, *sizes]).tolist())


def read_rows(file: Path, names: Sequence[str], first: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Columns of some rows, a row group after the other, each kept for the next call."""
    with reading(file, FIX):
        changed = file.stat().st_mtime_ns
    starts = _group_starts(file, changed)
    if first + count > starts[-1]:
        raise UserError(f"{file}: has {starts[-1]} rows, row {first + count} was asked for; {FIX}")
    for group, (start, end) in enumerate(zip(starts, starts[1:])):
        if start < first + count and end > first:
            rows = slice(max(first - start, 0), first + count - start)
            columns = _group(file, tuple(names), group, changed)
            yield {name: column[rows] for name, column in columns.items()}


# ---------------------------------------------------------------- the data set


class LeRobotData(Dataset):
    """Some episodes of a data set, by their numbers."""

    def __init__(self, root: Path, chosen: Sequence[int], settings: Settings) -> None:
        self.root = root
        self._info = info = read_json(root / "meta/info.json", FIX)
        self._rows = read_episodes(root, info)
        self._is_old = info["codebase_version"] == "v2.1"
        self._where = root / "meta/info.json"
        self._tasks = read_tasks(root, info["codebase_version"])
        with reading(self._where, FIX):
            self.fps = float(info["fps"])
            self._features: dict[str, dict] = dict(info["features"])
            self._kinds = {key: str(feature["dtype"]) for key, feature in self._features.items()}
            if not 0 < self.fps < 10**4:
                raise ValueError(f"{self.fps:g} frames per second")
        pictures = [key for key, kind in self._kinds.items() if kind in ("video", "image")]
        depth = [key for key in pictures if self._is_depth(key)]
        usual = {key.rpartition(".")[2]: key for key in pictures if key not in depth}
        self._keys = {name: usual.get(place, place) for name, place in settings.places().items()} or usual
        for name, key in self._keys.items():
            if key not in pictures:
                raise UserError(f"{root}: has no camera {name}; data.cameras: choose from {', '.join(usual)}")
        if not self._keys:
            raise UserError(f"{self._where}: names no camera among its features; give data with pictures")
        self.cameras = tuple(self._keys)
        self._actions, self.action_names = self._vector(settings.actions, "action", "actions")
        self._state, self.state_names = self._vector(settings.state, "observation.state", "state")

        lengths = self._rows["length"]
        self._first = np.concatenate([[0], np.cumsum(lengths)])  # frame of the data set
        self._data = self._places("data")
        self._videos = {
            key: self._places(f"videos/{key}") for key in self._keys.values() if self._kinds[key] == "video"
        }
        self.fingerprint = self._fingerprint()
        self._task_numbers = self._index()
        self._chosen = np.asarray(chosen, np.int64)
        self.lengths, self.starts = lengths[self._chosen], self._first[self._chosen]
        self.scope = f"{root} ({', '.join(self.cameras)}; {len(chosen)} of {len(lengths)} episodes)"
        unused = [key for key in pictures if key not in self._keys.values()]
        self.left_out = [f"the depth camera {key}" for key in unused if key in depth]
        self.left_out += [f"the camera {key} (data.cameras)" for key in unused if key not in depth]
        if len(chosen) < len(lengths):
            self.left_out.append(f"{len(lengths) - len(chosen)} episodes (data.split, data.held_out)")

    def _is_depth(self, key: str) -> bool:
        feature = self._features[key]
        notes = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
        return bool(notes.get("is_depth_map") or notes.get("video.is_depth_map"))

    def _vector(self, key: str | None, usual: str, setting: str) -> tuple[str | None, tuple[str, ...]]:
        """A feature with numbers, and their names; none where the usual one is missing."""
        if key is None or key == usual and key not in self._features:
            return None, ()
        vectors = [k for k, kind in self._kinds.items() if kind.startswith(("float", "int"))]
        if key not in vectors:
            raise UserError(f"{self.root}: has no {key}; data.{setting}: choose from {', '.join(vectors)}")
        with reading(self._where, FIX):
            (size,) = self._features[key]["shape"]
            names = self._features[key].get("names")
            while isinstance(names, dict):  # {"motors": [...]}, or name → number
                inner = list(names.values())
                names = inner[0] if len(inner) == 1 and isinstance(inner[0], (list, dict)) else list(names)
            if not isinstance(names, list) or len(names) != size:
                names = [f"{setting.rstrip('s')}_{n}" for n in range(size)]
            return key, tuple(map(str, names))

    def _path(self, kind: str, **values: Any) -> Path:
        """A file by the template of info.json, which must not lead out of the folder."""
        with reading(self._where, FIX):
            template = self._info[f"{kind}_path"]
            name = FIELD.sub(lambda found: format(values[found[1]], found[2] or ""), template)
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{kind}_path={template} leads out of the folder")
        return self.root / name

    def _places(self, what: str) -> list[tuple[Path, int]]:
        """Of each episode the file with its rows, or one camera's pictures, and where in it the first is."""
        kind, _, key = what.partition("/")
        kind = kind.rstrip("s") if kind == "videos" else kind
        count = len(self._rows["length"])
        if self._is_old:
            size = self._info.get("chunks_size") or 1000
            return [
                (self._path(kind, episode_chunk=n // size, episode_index=n, video_key=key), 0)
                for n in range(count)
            ]
        with reading(self.root / "meta/episodes", FIX):
            chunks, files = (self._rows[f"{what}/{each}_index"].tolist() for each in ("chunk", "file"))
            if kind == "video":
                frames = self._rows[f"{what}/from_timestamp"] * self.fps
                if not ((frames > -0.5) & (frames < MOST_FRAMES)).all():
                    raise ValueError(f"{what}/from_timestamp holds what is no time")
                firsts = np.rint(frames).astype(np.int64).tolist()
            else:
                taken: dict[tuple[int, int], int] = {}
                firsts = []
                for place, length in zip(zip(chunks, files), self._rows["length"].tolist()):
                    firsts.append(taken.get(place, 0))
                    taken[place] = firsts[-1] + length
        paths: dict[tuple[int, int], Path] = {}
        for chunk, file in zip(chunks, files):
            if (chunk, file) not in paths:
                paths[chunk, file] = self._path(kind, chunk_index=chunk, file_index=file, video_key=key)
        return [(paths[place], first) for place, first in zip(zip(chunks, files), firsts)]

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        meta = sorted(p for p in (self.root / "meta").rglob("*") if p.is_file() and p.suffix != ".md")
        for file in meta:
            digest.update(file.relative_to(self.root).as_posix().encode() + file.read_bytes())
        for places in (self._data, *self._videos.values()):
            for file in dict.fromkeys(path for path, _ in places):
                with reading(file, FIX):
                    digest.update(f"{file.relative_to(self.root)} {file.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------ checked and indexed once

    def _index(self) -> np.ndarray:
        place = index_place(self.root, f"lerobot-{self.fingerprint}", DONE)
        if not (place / DONE).is_file():
            with take_turn(place), writing(place, "instructions"):
                if not (place / DONE).is_file():
                    self._check_videos()
                    np.save(place / "tasks.npy", self._check_rows())
                    write_file(place / DONE, "")
        numbers = map_npy(place / "tasks.npy")
        if numbers.shape != (self._first[-1],) or not set(np.unique(numbers).tolist()) <= self._tasks.keys():
            raise UserError(f"{place}: damaged; delete it, so that it is made again")
        return numbers

    def _check_videos(self) -> None:
        """That each video keeps its clock and has the frames that its episodes need."""
        needs: dict[Path, tuple[int, int]] = {}  # frames, and the episode that needs the last
        for places in self._videos.values():
            for number, ((path, first), length) in enumerate(zip(places, self._rows["length"].tolist())):
                needs[path] = max(needs.get(path, (0, 0)), (first + length, number))

        def check(path: Path) -> None:
            frames, (needed, number) = timed_video(path, self.fps).frames, needs[path]
            if frames < needed:
                raise UserError(
                    f"{path}: has {frames} frames, episode {number} needs {needed}; {FIX} or leave it out"
                )

        with ThreadPoolExecutor(READERS) as pool:
            for _ in track(pool.map(check, needs), "videos", total=len(needs), transient=True):
                pass

    def _check_rows(self) -> np.ndarray:
        """The number of each frame's instruction; the files have the rows that the episodes say."""
        numbers = np.empty(self._first[-1], np.int32)
        files: dict[Path, list[int]] = {}
        for number, (path, _) in enumerate(self._data):
            files.setdefault(path, []).append(number)
        names = ("episode_index", "frame_index", "task_index", "timestamp")
        kept = [key for key in self._keys.values() if self._kinds[key] == "image"]
        kept += [key for key in (self._actions, self._state) if key]

        def check(path: Path) -> None:
            if missing := set(kept) - set(parquet(path).schema_arrow.names):
                raise UserError(f"{path}: has no column {min(missing)}, which info.json names; {FIX}")
            rows = read_table(path, names)
            with reading(path, FIX):
                for number in files[path]:
                    first, length = self._data[number][1], int(self._rows["length"][number])
                    mine = slice(first, first + length)
                    found = int((rows["episode_index"] == number).sum())
                    if found != length or (rows["episode_index"][mine] != number).any():
                        raise ValueError(f"episode {number} has {found} rows here and {length} in meta")
                    steps = np.arange(length)
                    if (rows["frame_index"][mine] != steps).any():
                        raise ValueError(f"episode {number}: its frame_index does not count 0, 1, …")
                    away = np.abs(rows["timestamp"][mine].astype(np.float64).ravel() * self.fps - steps)
                    if not (away <= 0.5).all():
                        frame = int(np.argmax(~(away <= 0.5)))
                        shown = rows["timestamp"][mine][frame]
                        raise ValueError(
                            f"episode {number}, frame {frame}: its timestamp {shown} is not {frame} / {self.fps:g} s"
                        )
                    tasks = rows["task_index"][mine]
                    if unknown := set(np.unique(tasks).tolist()) - self._tasks.keys():
                        raise ValueError(
                            f"episode {number}: task {min(unknown)} is not in the table of tasks"
                        )
                    numbers[self._first[number] : self._first[number + 1]] = tasks

        with ThreadPoolExecutor(READERS) as pool:
            for _ in track(pool.map(check, files), "rows", total=len(files), transient=True):
                pass
        return numbers

    # ------------------------------------------------------------ a Dataset

    def episode(self, number: int) -> Episode:
        chosen, start, length = int(self._chosen[number]), int(self.starts[number]), int(self.lengths[number])
        tasks = self._task_numbers[start : start + length]
        same = bool((tasks == tasks[0]).all())
        texts = tuple(self._tasks[task] for task in (tasks[:1] if same else tasks).tolist())
        task = str(self._rows[TASK][chosen]) if TASK in self._rows else ""
        return Episode(f"{chosen:06d}", start, length, texts, task)

    def _number(self, frame: int) -> int:
        return int(np.searchsorted(self._first, frame, side="right")) - 1

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        number = self._number(episode.start)
        offset, found = episode.start - int(self._first[number]), {}
        for camera in cameras:
            key = self._keys[camera]
            if key in self._videos:
                path, first = self._videos[key][number]
                wanted = [first + offset + position for position in positions]
                found[camera] = timed_video(path, self.fps).read(wanted)
                continue
            path, first = self._data[number]
            pictures = {}
            for position in sorted(set(positions)):
                row = first + offset + position
                (columns,) = read_rows(path, [key], row, 1)
                where = f"{path}: {key} of row {row}"
                pictures[position] = decode_picture(columns[key][0]["bytes"] or b"", where)
            frames = [pictures[position] for position in positions]
            found[camera] = stack_frames(frames, [f"{path}: episode {number}"] * len(frames))
        return found

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        names = [key for key in (self._actions, self._state) if key]
        number, found = self._number(frames.start), []
        path, first = self._data[number]
        row = first + frames.start - int(self._first[number])
        for columns in read_rows(path, names, row, len(frames)):
            found.append(np.concatenate([columns[name].reshape(len(columns[name]), -1) for name in names], 1))
        joined = np.concatenate(found)
        if joined.shape[1] != (size := len(self.action_names) + len(self.state_names)):
            raise UserError(f"{path}: {joined.shape[1]} numbers per row, info.json says {size}; {FIX}")
        return joined.astype(np.float32)
