"""LeRobot's data as data of every stage. The files of episodes are checked when these are first opened, which
leaves an index of the instructions:

    <root>/.defi/lerobot-<hash>/tasks.npy   int32 [frames]: number of each frame's instruction, or -1
                                done        written last

The hash is of the data's fingerprint, the features and the episodes that were chosen.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from rich.progress import track

from defi.data.episode import (
    Dataset,
    DataSettings,
    Episode,
    Frames,
    Part,
    completed,
    file_stamp,
    of_part,
)
from defi.data.lerobot.meta import ROBOT, Meta, download, find_root
from defi.data.lerobot.rows import FIX, columns_of, read_rows, read_table
from defi.engine.output import index_place, take_turn, write_file
from defi.errors import UserError, reading, writing
from defi.files import read_json
from defi.npy import map_npy
from defi.picture import decode_picture, stack_frames
from defi.processes import print_once
from defi.robot.spec import Robot
from defi.video import timed_video

VERSION = 1  # of what is checked and how it is kept
DONE, READERS = "done", 4
LEAVE = "leave the episode out (data.split, data.held_out)"
COUNTERS = ("episode_index", "frame_index", "task_index", "timestamp")


@dataclass(kw_only=True)
class Settings(DataSettings):
    """split, held_out: ranges of episodes ("0:90", "0:7,8:90%"), or one of info.json's names for them.

    actions, state: the features that hold them; those of these names may be missing.
    """

    actions: str | None = "action"
    state: str | None = "observation.state"

    def open(self, part: Part) -> "LeRobotData":
        try:
            return self._opened(find_root(self.root), part)
        except UserError as error:  # a download that was broken off is found, too: it goes on
            if Path(self.root).is_dir() or not isinstance(error.__context__, FileNotFoundError):
                raise
        return self._opened(download(self.root), part)

    def _opened(self, root: Path, part: Part) -> "LeRobotData":
        meta = Meta(root)
        everything = range(len(meta.lengths))
        split, held_out = meta.episodes(self.split, "split"), meta.episodes(self.held_out, "held_out")
        mine, other = (held_out, split) if part == "held_out" else (split, held_out)
        if part == "all":
            chosen = split or everything
        elif mine or other:  # what is not named is what the other one leaves, if it leaves something
            others = set(other or ())
            chosen = mine or [n for n in everything if n not in others] or everything
            if part == "held_out" and (shared := len(others.intersection(chosen))):
                print_once(f"{meta.root}: {shared:,} episodes are both in data.split and in data.held_out")
        else:
            chosen = of_part(everything, part)
        return LeRobotData(meta, chosen, self)


class LeRobotData(Dataset):
    """Some episodes of a data set, by their numbers."""

    def __init__(self, meta: Meta, chosen: Sequence[int], settings: Settings) -> None:
        self.root, self.fps, self._meta = meta.root, meta.fps, meta
        self._keys = self._cameras(settings.places())
        self.cameras = tuple(self._keys)
        self._actions, self.action_names = meta.vector(settings.actions, "action", "actions")
        self._state, self.state_names = meta.vector(settings.state, "observation.state", "state")
        self._chosen = np.asarray(chosen, np.int64)
        self.lengths, self.starts = meta.lengths[self._chosen], meta.firsts[self._chosen]
        self._robot = self._described()
        self._videos = [key for key in self._keys.values() if meta.features[key]["dtype"] == "video"]
        self._tasks = meta.tasks
        self.fingerprint = self._fingerprint()
        self._task_numbers = self._index()
        self.scope = f"{self.root} ({', '.join(self.cameras)}; {len(chosen)} of {len(meta.lengths)} episodes)"
        unused = [key for key in meta.pictures if key not in self._keys.values()]
        self.left_out = [f"the depth camera {key}" for key in meta.depth if key not in self._keys.values()]
        self.left_out += [f"the camera {key} (data.cameras)" for key in unused]
        if left := len(meta.lengths) - len(chosen):
            self.left_out.append(f"{left} episodes (data.split, data.held_out)")

    def _cameras(self, places: dict[str, str]) -> dict[str, str]:
        """Camera → feature. Without a name of its own it has the feature's, less `observation.images.`."""
        meta = self._meta
        usual = {key.removeprefix("observation.").removeprefix("images."): key for key in meta.pictures}
        keys = {name: usual.get(place, place) for name, place in places.items()} or usual
        if not keys:
            raise UserError(f"{meta.info_file}: names no camera among its features; give data with pictures")
        for name, key in keys.items():
            if key not in (*meta.pictures, *meta.depth):
                known = ", ".join(usual) or "none"
                raise UserError(f"{self.root}: has no camera {name}; data.cameras: choose from {known}")
        return keys

    def _fingerprint(self) -> str:
        """A hash of meta/, of the chosen vectors and of the sizes of the files that hold the episodes."""
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in self._meta.files))
        digest.update(f"{self._actions} {self._state}".encode())
        data = {self._meta.place(n)[0] for n in self._chosen.tolist()}
        places = (self._meta.place(n, key) for key in (None, *self._videos) for n in self._chosen.tolist())
        for file in dict.fromkeys(path for path, _ in places):
            with reading(file, FIX):
                digest.update(f"{file.relative_to(self.root)} {file.stat().st_size}\n".encode())
        self.stamp = file_stamp(sorted(data))
        return digest.hexdigest()[:16]

    def _described(self) -> Robot:
        """As info.json and, of the numbers that are usually taken, `ROBOT` say."""
        robot, file = super().robot(), self.root / ROBOT
        if not file.is_file():
            return robot
        written = {"actions": self._actions == "action", "state": self._state == "observation.state"}
        parts = [part for part, own in written.items() if own]
        return completed(robot, read_json(file, "correct it, or delete it"), file, parts)

    def robot(self) -> Robot:
        return self._robot

    # ------------------------------------------------------------ checked and indexed once

    def _index(self) -> np.ndarray:
        asked = f"{VERSION} {self.fingerprint} {self._keys} {self._actions} {self._state} "
        digest = hashlib.sha256(asked.encode() + self._chosen.tobytes()).hexdigest()[:16]
        place = index_place(self.root, f"lerobot-{digest}", DONE)
        if not (place / DONE).is_file():
            with take_turn(place), writing(place, "instructions", fix="repeat the command"):
                if not (place / DONE).is_file():
                    self._check_videos()
                    np.save(place / "tasks.npy", self._check_rows())
                    write_file(place / DONE, "")
        numbers = map_npy(place / "tasks.npy")
        if numbers.shape != (self._meta.firsts[-1],) or numbers.dtype != np.int32:
            raise UserError(f"{place}: damaged; delete it, so that it is made again")
        return numbers

    def _check_videos(self) -> None:
        """That each video keeps its clock and has the frames that its episodes need."""
        needs: dict[Path, tuple[int, int]] = {}  # frames, and the episode that needs the last
        for key in self._videos:
            for number, length in zip(self._chosen.tolist(), self.lengths.tolist()):
                path, first = self._meta.place(number, key)
                needs[path] = max(needs.get(path, (0, 0)), (first + length, number))

        def check(path: Path) -> None:
            frames, (needed, number) = timed_video(path, self._meta.fps).frames, needs[path]
            if frames < needed:
                fault = f"has {frames} frames, episode {number} needs {needed}"
                raise UserError(f"{path}: {fault}; {FIX}, or {LEAVE}")

        _each(check, needs, "videos")

    def _check_rows(self) -> np.ndarray:
        """The number of each frame's instruction; the files have the rows that the episodes say."""
        numbers = np.full(self._meta.firsts[-1], -1, np.int32)
        files: dict[Path, list[tuple[int, int]]] = {}
        for number in self._chosen.tolist():
            path, first = self._meta.place(number)
            files.setdefault(path, []).append((number, first))
        kept = {*self._keys.values()} - {*self._videos} | {key for key in (self._actions, self._state) if key}

        def check(path: Path) -> None:
            rows = read_table(path, COUNTERS)
            with reading(path, f"{FIX}, or {LEAVE}"):
                if missing := kept - set(columns_of(path)):
                    raise ValueError(f"has no column {min(missing)}, which info.json names")
                for number, first in files[path]:
                    start, length = self._meta.firsts[number], self._meta.lengths[number]
                    mine = {name: column[first : first + length].ravel() for name, column in rows.items()}
                    if found := self._fault(
                        number, int(length), mine, int((rows["episode_index"] == number).sum())
                    ):
                        raise ValueError(f"episode {number}{found}")
                    numbers[start : start + length] = mine["task_index"]

        _each(check, files, "rows")
        return numbers

    def _fault(self, number: int, length: int, rows: dict[str, np.ndarray], found: int) -> str:
        """What is wrong with an episode's rows, of which its file has so many; "" if nothing is."""
        steps = np.arange(length)
        if found != length or (rows["episode_index"] != number).any():
            return f" has {found} rows here, {length} in meta/, or lies between others"
        if (rows["frame_index"] != steps).any():
            return ": its frame_index does not count 0, 1, …"
        if not (near := np.abs(rows["timestamp"].astype(np.float64) * self._meta.fps - steps) <= 0.5).all():
            frame = int(np.argmin(near))
            return f", frame {frame}: timestamp {rows['timestamp'][frame]}, not {frame} / {self.fps:g} s"
        if unknown := set(np.unique(rows["task_index"]).tolist()) - self._tasks.keys():
            return f": task {min(unknown)} is not among the tasks in meta/"
        return ""

    # ------------------------------------------------------------ a Dataset

    def episode(self, number: int) -> Episode:
        chosen, start, length = int(self._chosen[number]), int(self.starts[number]), int(self.lengths[number])
        tasks = self._task_numbers[start : start + length]
        tasks = tasks[:1] if (tasks == tasks[0]).all() else tasks
        texts = tuple(self._tasks[task] for task in tasks.tolist())
        return Episode(f"{chosen:06d}", start, length, texts, self._meta.task_name(chosen))

    def _number(self, frame: int) -> int:
        return int(np.searchsorted(self._meta.firsts, frame, side="right")) - 1

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        number = self._number(episode.start)
        offset, found = episode.start - int(self._meta.firsts[number]), {}
        for camera in cameras:
            key = self._keys[camera]
            if key in self._videos:
                path, first = self._meta.place(number, key)
                wanted = [first + offset + position for position in positions]
                found[camera] = timed_video(path, self._meta.fps).read(wanted)
                continue
            path, first = self._meta.place(number)
            pictures = {}
            for position in sorted(set(positions)):
                row = first + offset + position
                coded = read_rows(path, [key], row, 1)[key][0]
                with reading(path, FIX):
                    pictures[position] = decode_picture(coded["bytes"] or b"", f"{path}: {key} of row {row}")
            frames = [pictures[position] for position in positions]
            found[camera] = stack_frames(frames, [f"{path}: episode {number}"] * len(frames))
        return found

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        vectors = ((self._actions, self.action_names), (self._state, self.state_names))
        sizes = {key: len(names) for key, names in vectors if key}
        number = self._number(frames.start)
        path, first = self._meta.place(number)
        row = first + frames.start - int(self._meta.firsts[number])
        columns = read_rows(path, list(sizes), row, len(frames))
        found = {key: column.reshape(len(column), -1) for key, column in columns.items()}
        for key, column in found.items():
            if column.shape[1] != sizes[key] or column.dtype.kind not in "fiu":
                fault = f"{key} has {column.shape[1]} values of {column.dtype} in each row"
                raise UserError(
                    f"{path}: {fault}, {sizes[key]} numbers in info.json; {FIX}, or correct info.json"
                )
        return np.concatenate([found[key] for key, _ in vectors if key], axis=1).astype(np.float32)


def _each(check: Callable[[Path], None], files: Iterable[Path], what: str) -> None:
    files = list(files)
    with ThreadPoolExecutor(READERS) as pool:
        for _ in track(pool.map(check, files), what, total=len(files), transient=True):
            pass
