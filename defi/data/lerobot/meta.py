"""What the files in meta/ say of a data set, and where it lies if it is one of the hub."""

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from defi.data.lerobot.rows import FIX, columns_of, read_table
from defi.errors import UserError, reading
from defi.files import inside, read_json, read_text
from defi.instructions import read_instruction

VERSIONS = ("v2.1", "v3.0")
ROBOT = "meta/robot.json"  # a file of ours: a `Robot`, whose action and observation.state the data hold
TASK = "defi/task"  # a column of ours in the table of episodes: `Episode.task`
PLACES = ("episode_index", "length", "data/", "videos/", TASK)  # columns of that table which are read
FIELD = re.compile(r"\{(\w+)(?::(0?\d{1,2}d))?\}")  # of a path, "{chunk_index:03d}"
RANGE = re.compile(r"(\d+)?(%)?:(\d+)?(%)?")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LONGEST, MOST_FRAMES = 10**7, 10**9  # frames of an episode, and of all


def find_root(root: str) -> Path:
    """The data set's folder. One of the hub, `user/name`, is found in its cache, or in LeRobot's (whole or
    not); if it is in neither, it is downloaded."""
    name = _hub_name(root)
    if Path(root).is_dir():
        return Path(root)
    if not HUB_NAME.fullmatch(name) or name == root and Path(name).parent.is_dir():
        raise UserError(f"{root}: no such folder; give a LeRobot data set, or hf://user/name of the hub")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    lerobot = Path(os.environ.get("HF_LEROBOT_HOME") or Path(constants.HF_HOME, "lerobot"))
    if (lerobot / name / "meta/info.json").is_file():
        return lerobot / name
    caches = constants.HF_HUB_CACHE, str(lerobot / "hub")
    for cache, revision in product(caches, ("main", *reversed(VERSIONS))):
        try:
            found = snapshot_download(
                name, repo_type="dataset", revision=revision, cache_dir=cache, local_files_only=True
            )
        except LocalEntryNotFoundError:
            continue
        if Path(found, "meta/info.json").is_file():
            return Path(found)
    return download(root)


def download(root: str) -> Path:
    """Fetch what the hub's cache lacks of a data set of the hub; without a network, what is there."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = _hub_name(root)
    fix = "check name and network, log in with `hf auth login`, or give a folder"
    with reading(f"{constants.ENDPOINT}/datasets/{name}", fix):
        try:
            return Path(snapshot_download(name, repo_type="dataset"))
        except LocalEntryNotFoundError:
            raise ValueError("neither in the hub's cache nor to be had from the hub") from None


def _hub_name(root: str) -> str:
    return root.removeprefix("hf://").removeprefix("datasets/")


class Meta:
    """Cameras, numbers, episodes and instructions of a data set, and in which files each episode lies.

    fps: frames per second.
    features: name → what info.json says of it; pictures, depth: those with colours, and with distances.
    lengths: frames of each episode; firsts: number of its first in the data set; last, of all.
    tasks: instruction by number. files: those in meta/ that are read.

    Raises:
        UserError: a file is missing or damaged, or the version another one.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.info_file = root, root / "meta/info.json"
        self.info = info = read_json(self.info_file, "give the folder of a LeRobot data set (meta/info.json)")
        self.version = info.get("codebase_version")
        if self.version not in VERSIONS:
            fix = "convert it with LeRobot's own converters to one of these"
            raise UserError(
                f"{self.info_file}: version {self.version}; {' and '.join(VERSIONS)} can be read: {fix}"
            )
        if self.version == "v2.1" and (root / "meta/episodes").is_dir():
            raise UserError(f"{self.info_file}: says v2.1, the files are v3.0's; correct codebase_version")
        with reading(self.info_file, FIX):
            self.fps = float(info["fps"])
            if not 0 < self.fps < 10**4:
                raise ValueError(f"{self.fps:g} frames per second")
            self.features = {
                str(key): {**feature, "dtype": feature["dtype"]} for key, feature in info["features"].items()
            }
            pictures = [key for key, each in self.features.items() if each["dtype"] in ("video", "image")]
            self.depth = [key for key in pictures if self._is_depth(self.features[key])]
            self.pictures = [key for key in pictures if key not in self.depth]
        self.files, self._known = [self.info_file], {}
        self._rows = self._read_episodes()
        self.lengths: np.ndarray = self._rows["length"]
        self.firsts = np.concatenate([[0], np.cumsum(self.lengths)])

    @staticmethod
    def _is_depth(feature: dict[str, Any]) -> bool:
        notes = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
        return bool(notes.get("is_depth_map") or notes.get("video.is_depth_map"))

    def _read_episodes(self) -> dict[str, np.ndarray]:
        """Columns of the table of episodes, in order of their numbers."""
        if self.version == "v2.1":
            file = self.root / "meta/episodes.jsonl"
            rows = self._read_lines(file)
            with reading(file, FIX):
                columns = {key: np.array([row[key] for row in rows]) for key in ("episode_index", "length")}
        else:
            file = self.root / "meta/episodes"
            files = sorted(file.glob("*/*.parquet"))
            with reading(file, FIX):
                if not files:
                    raise FileNotFoundError
            names = [n for n in columns_of(files[0]) if n.startswith(PLACES)]
            parts = [read_table(each, names) for each in files]
            columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
            self.files += files
        with reading(file, FIX):
            order = np.argsort(columns["episode_index"], kind="stable")
            columns = {name: column[order] for name, column in columns.items()}
            lengths = columns["length"] = columns["length"].astype(np.int64)
            if not np.array_equal(columns["episode_index"], np.arange(len(order))) or len(order) == 0:
                raise ValueError("its episodes are not numbered 0, 1, …")
            if (wrong := (lengths < 1) | (lengths > LONGEST)).any() or lengths.sum() > MOST_FRAMES:
                number = int(np.argmax(wrong if wrong.any() else lengths))
                raise ValueError(f"episode {number} has {lengths[number]:,} frames")
        return columns

    def _read_lines(self, file: Path) -> list[dict[str, Any]]:
        """The objects of a file with one in each line."""
        self.files.append(file)
        with reading(file, FIX):
            rows = [json.loads(line) for line in read_text(file, FIX).split("\n") if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("holds lines that are no objects")
            return rows

    @cached_property
    def tasks(self) -> dict[int, str]:
        if self.version == "v2.1":
            file = self.root / "meta/tasks.jsonl"
            rows = [(row.get("task_index"), row.get("task")) for row in self._read_lines(file)]
        else:
            file = self.root / "meta/tasks.parquet"
            self.files.append(file)
            names = columns_of(file)  # pandas keeps the texts as an index, named or not
            text = next((name for name in ("task", "__index_level_0__") if name in names), "task")
            table = read_table(file, ["task_index", text])
            rows = list(zip(table["task_index"].tolist(), table[text].tolist()))
        if faults := [number for number, _ in rows if type(number) is not int]:
            raise UserError(f"{file}: {faults[0]!r} is no number of a task; {FIX}")
        return {number: read_instruction(text, f"{file}: task {number}") for number, text in rows}

    def task_name(self, number: int) -> str:
        """`Episode.task`; "" where the data set does not say."""
        return str(self._rows[TASK][number]) if TASK in self._rows else ""

    def vector(self, key: str | None, usual: str, setting: str) -> tuple[str | None, tuple[str, ...]]:
        """A feature with numbers, and their names; none where the usual one is missing."""
        if key is None or key == usual and key not in self.features:
            return None, ()
        known = [k for k, each in self.features.items() if str(each["dtype"]).startswith(("float", "int"))]
        if key not in known:
            raise UserError(f"{self.root}: has no {key}; data.{setting}: choose from {', '.join(known)}")
        with reading(self.info_file, FIX):
            (size,) = self.features[key]["shape"]
            names = self.features[key].get("names")
            while isinstance(names, dict):  # {"motors": [...]}, or name → number
                inner = list(names.values())
                names = inner[0] if len(inner) == 1 and isinstance(inner[0], (list, dict)) else list(names)
            if not isinstance(names, list) or len(names) != size:
                names = [f"{setting.rstrip('s')}_{n}" for n in range(size)]
            return key, tuple(map(str, names))

    def episodes(self, text: str | None, setting: str) -> Sequence[int] | None:
        """Numbers of those that a split names: ranges, "0:90" or "0:7,8:90%", or info.json's name for some.

        Raises:
            UserError: it is neither, or holds no episode.
        """
        if text is None:
            return None
        everything, chosen = range(len(self.lengths)), set[int]()
        named = splits if isinstance(splits := self.info.get("splits"), dict) else {}
        for part in str(named.get(text, text)).strip("[]").split(","):
            if not (found := RANGE.fullmatch(part.strip())):
                raise UserError(
                    f"data.{setting}={text}: give a range of episodes, 0:90 say, or one of {list(named)}"
                )
            first, last = (
                None if not n else int(n) * len(everything) // 100 if percent else int(n)
                for n, percent in (found.groups()[:2], found.groups()[2:])
            )
            chosen.update(everything[first:last])
        if not chosen:
            count = f"holds none of the {len(everything)} episodes"
            raise UserError(f"data.{setting}={text}: {count}; give another range")
        return sorted(chosen)

    # ------------------------------------------------------------ files

    def place(self, number: int, camera: str | None = None) -> tuple[Path, int]:
        """The file with an episode's rows, or a camera's video of it, and where in it the first frame is."""
        kind = "video" if camera else "data"
        if self.version == "v2.1":
            with reading(self.info_file, FIX):
                chunk = number // int(self.info.get("chunks_size") or 1000)
            return self._path(kind, episode_chunk=chunk, episode_index=number, video_key=camera), 0
        chunks, files, firsts = self._columns(camera)
        values = {"chunk_index": int(chunks[number]), "file_index": int(files[number]), "video_key": camera}
        return self._path(kind, **values), int(firsts[number])

    def _path(self, kind: str, **values: Any) -> Path:
        with reading(self.info_file, FIX):
            return _fill(self.root, self.info[f"{kind}_path"], tuple(values.items()))

    def _columns(self, camera: str | None) -> tuple[np.ndarray, ...]:
        """Of each episode the chunk and the file, and where in the file its first frame is."""
        if camera in self._known:
            return self._known[camera]
        what = f"videos/{camera}" if camera else "data"
        with reading(self.root / "meta/episodes", FIX):
            chunks, files = (self._rows[f"{what}/{each}_index"] for each in ("chunk", "file"))
            if camera:
                firsts = self._rows[f"{what}/from_timestamp"] * self.fps
                if not ((firsts > -0.5) & (firsts < MOST_FRAMES)).all():
                    raise ValueError(f"{what}/from_timestamp holds what is no time")
            else:  # one after the other
                order = np.lexsort((np.arange(len(chunks)), files, chunks))
                begins = (np.diff(chunks[order], prepend=-1) != 0) | (np.diff(files[order], prepend=-1) != 0)
                before = self.lengths[order].cumsum() - self.lengths[order]
                firsts = np.empty(len(order))
                firsts[order] = before - np.maximum.accumulate(np.where(begins, before, 0))
            return self._known.setdefault(camera, (chunks, files, np.rint(firsts).astype(np.int64)))


@lru_cache(maxsize=4096)
def _fill(root: Path, template: str, values: tuple[tuple[str, Any], ...]) -> Path:
    """The file that a template names. UserError if it leads out of the folder."""
    given = dict(values)
    return root / inside(root, FIELD.sub(lambda found: format(given[found[1]], found[2] or ""), template))
