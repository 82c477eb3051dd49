"""HDF5 files of teleoperation: ALOHA's, robomimic's, LIBERO's, or any other whose places are named.

A process of its own reads them (`reader.py`). What the episodes are is found once and kept beside the data:

    <root>/.defi/hdf5-<hash>/episodes.json   a list per file, in order, of what `reader.episodes` found in it

The hash is of names, sizes and times of the files, and of what was asked.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.progress import track

from defi.data.episode import Dataset, DataSettings, Episode, Frames, Part, distinct, file_name, of_part
from defi.data.hdf5.reader import ask
from defi.engine.output import index_place, take_turn, write_file
from defi.errors import UserError, writing
from defi.files import find_files, read_json
from defi.instructions import read_instruction
from defi.robot.spec import Gripper, Robot

VERSION, EPISODES = 2, "episodes.json"
SUFFIXES = (".hdf5", ".h5")
TEXTS = ("language_instruction", "problem_info", "ep_meta")  # the last two hold JSON, with one of
TEXT_KEYS = ("language_instruction", "lang")
SCENE = re.compile(r"^([A-Z]+_)+SCENE\d+_|_demo$")  # KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5
ON_HAND = re.compile("wrist|hand")  # cameras that move with the robot come last, where nobody names them


@dataclass(frozen=True)
class Layout:
    """Where things usually are. pictures: `*` is the camera's name; elsewhere it is any part of one.

    flip: robosuite's cameras begin at the bottom. robomimic turns them when it writes files, LIBERO does not.
    (Copies of LIBERO in other formats are often turned by 180°, which also mirrors them.)
    """

    groups: str
    pictures: str
    actions: tuple[str, ...]
    state: tuple[str, ...]
    fps: float | None
    flip: bool = False


OWN = Layout("", "", (), (), None)  # one that the settings say
ROBOSUITE_STATE = ("obs/robot*_eef_pos", "obs/robot*_eef_quat", "obs/robot*_gripper_qpos")
LAYOUTS = {
    "aloha": Layout("", "observations/images/*", ("action",), ("observations/qpos",), 50),
    "robomimic": Layout("data", "obs/*_image", ("actions",), ROBOSUITE_STATE, 20),
    "libero": Layout("data", "obs/*_rgb", ("actions",), ("obs/ee_states", "obs/gripper_states"), 20, True),
}


@dataclass(kw_only=True)
class Settings(DataSettings):
    """configs/data/hdf5.yaml says what they mean."""

    layout: str | None = None
    groups: str | None = None
    actions: list[str] | None = None
    state: list[str] | None = None
    language: str | None = None
    instruction: str | None = None
    fps: float | None = None
    flip: bool | None = None
    crop: dict[str, list[int]] | None = None
    pad: bool = False

    def open(self, part: Part) -> "HDF5Data":
        if self.layout not in (None, *LAYOUTS):
            raise UserError(f"data.layout={self.layout}: choose from {', '.join(LAYOUTS)}, or leave it null")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(f"data.fps={self.fps}: must be a number of frames per second")
        named = self.held_out if part == "held_out" else None
        return HDF5Data(Path(self.root, named or self.split or ""), self, part)


class HDF5Data(Dataset):
    """An episode per file, or per member of a group of it. Frames are numbered through all parts."""

    def __init__(self, place: Path, settings: Settings, part: Part) -> None:
        self.root, self._settings = place, settings
        files = [place] if place.is_file() else sorted(find_files(place, SUFFIXES), key=_natural)
        if not files:
            raise UserError(f"{place}: no HDF5 files here ({', '.join(SUFFIXES)}); check data.root")
        if part == "training" and settings.held_out and not settings.split:
            apart = Path(settings.root, settings.held_out)
            kept = [file for file in files if not file.is_relative_to(apart)] or files
            self.left_out = [f"{apart} (data.held_out)"] if len(kept) < len(files) else []
            files = kept
        tree = _first_tree(files)
        self._layout = layout = _layout(settings, tree, files[0])
        self._groups = layout.groups if settings.groups is None else settings.groups
        members = _members(tree, self._groups)
        self._places = self._cameras(members)
        self.cameras = tuple(self._places)
        for camera, box in (settings.crop or {}).items():
            if camera not in self.cameras or len(box) != 4 or min(box) < 0 or min(box[2:]) < 1:
                raise UserError(
                    f"data.crop.{camera}={box}: give one of the cameras ({', '.join(self.cameras)}) "
                    "[top, left, height, width] in pixels, height and width at least 1"
                )
        self._actions = _matching(settings.actions, layout.actions, members)
        self._state = _matching(settings.state, layout.state, members)
        self.fps = settings.fps or layout.fps
        self._flip = layout.flip if settings.flip is None else settings.flip
        self.scope = f"{place} ({', '.join(self.cameras)})"
        self._number(files, self._scan(files), part)

    def _cameras(self, members: dict[str, Any]) -> dict[str, str]:
        """Camera → path of its pictures in an episode."""
        pattern = re.compile(re.escape(self._layout.pictures).replace(r"\*", "(.+)"))
        found = {match[1]: path for path in members if (match := pattern.fullmatch(path))}
        known = {
            name: found[name] for name in sorted(found, key=lambda n: (bool(ON_HAND.search(n)), _natural(n)))
        }
        if named := self._settings.places():
            return {name: known.get(place, place) for name, place in named.items()}
        if not known:
            like = [path for path, (shape, _) in members.items() if len(shape) == 4 and shape[-1] == 3]
            raise UserError(
                f"{self.root}: of no known layout ({', '.join(LAYOUTS)}); name its cameras, data.cameras="
                f"[name:path]; an episode holds {', '.join((like or list(members))[:20]) or 'nothing'}"
            )
        return known

    def _scan(self, files: list[Path]) -> list[list[dict[str, Any]]]:
        """What the episodes of each file are, from the index or the files."""
        texts = TEXTS if self._settings.language is None else (self._settings.language,)
        asked = [self._groups, [*self._places.values()], [*self._actions, *self._state]]
        asked.append([] if self._settings.instruction else list(texts))
        stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        digest = hashlib.sha256(json.dumps([VERSION, asked, stats]).encode()).hexdigest()[:16]
        index = index_place(self.root, f"hdf5-{digest}", EPISODES) / EPISODES
        if not index.is_file():
            what, fix = "what the files hold", "repeat the command"
            with take_turn(index.parent), writing(index.parent, what, fix=fix):
                if not index.is_file():
                    found = [_episodes(file, *asked) for file in track(files, "HDF5 files", transient=True)]
                    write_file(index, json.dumps(found))
        return read_json(index, "delete it, so that it is made again", list)

    def _number(self, files: list[Path], found: list[list[dict]], part: Part) -> None:
        """Number all episodes, and keep those of a part that can be read."""
        folder = self.root.parent if self.root.is_file() else self.root
        all_ = [(file, each) for file, episodes in zip(files, found) for each in episodes]
        paths = [[*file.relative_to(folder).with_suffix("").parts, each["group"]] for file, each in all_]
        names = distinct(file_name("-".join(path).replace("/", "-").strip("-")) for path in paths)
        first = next((each["shapes"] for _, each in all_ if not each["fault"]), {})
        start, recordings = 0, []
        for name, (file, each) in zip(names, all_):
            length, fault = self._length(file, each, first)
            text = self._settings.instruction or self._sentence(file, each["text"])
            recordings.append((Episode(name, start, length, (text,)), file, each["group"], fault))
            start += length
        chosen = of_part(recordings, "all" if self._settings.held_out else part)
        if others := len(recordings) - len(chosen):
            self.left_out = [f"{others:,} episodes of the other part (data.split, data.held_out)"]
        self.faults = {episode.name: fault for episode, _, _, fault in chosen if fault}
        self._found = {
            episode.start: (episode, file, group) for episode, file, group, fault in chosen if not fault
        }
        if self.faults:
            from defi.processes import print_once  # torch, which the process that reads does without

            line = f"{len(self.faults)} of {len(chosen)} recordings are left out"
            line = f"{self.root}: {line}; the first: {next(iter(self.faults.values()))}"
            if not self._found:
                raise UserError(line)
            print_once(line)
            self.left_out = [*self.left_out, f"recordings that cannot be read ({len(self.faults):,})"]
        if not self._found:
            raise UserError(f"{self.root}: holds no episodes; correct data.groups")
        self.starts = np.array(list(self._found), np.int64)
        self.lengths = np.array([episode.length for episode, *_ in self._found.values()], np.int64)
        self.action_names, self.state_names = (_names(p, first) for p in (self._actions, self._state))
        said = [(e.name, e.length, e.texts, each["sum"]) for (e, *_), (_, each) in zip(recordings, all_)]
        identity = [said, self._actions, self._state, [file.stat().st_size for file in files]]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def _sentence(self, file: Path, text: str) -> str:
        """The instruction in a text, which may be JSON; or in the name of LIBERO's file."""
        if text.startswith("{"):
            try:
                said = json.loads(text)
                text = next((read_instruction(said[key], str(file)) for key in TEXT_KEYS if key in said), "")
            except (ValueError, RecursionError):  # a text in braces, or a damaged one
                pass
        if not text and self._layout is LAYOUTS["libero"] and self._settings.language is None:
            text = SCENE.sub("", file.stem).replace("_", " ")
        return text.strip()

    def _length(self, file: Path, episode: dict[str, Any], first: dict[str, list[int]]) -> tuple[int, str]:
        """Frames, and why it is no episode, if so."""
        if episode["fault"]:
            return 0, episode["fault"]
        shapes, where = episode["shapes"], ": ".join(filter(None, (str(file), episode["group"])))
        lengths = {name: shapes[place][0] for name, place in self._places.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            return 0, f"{where}: cameras of different or no length: {lengths}"
        length = next(iter(lengths.values()))
        for place in (*self._actions, *self._state):
            if shapes[place][0] != length:
                return 0, f"{where}: {place} has {shapes[place][0]} rows for {length} pictures"
            if shapes[place][1:] != first[place][1:]:
                return 0, f"{where}: {place} is {shapes[place]}, the first recording's {first[place]}"
        return length, ""

    def episode(self, number: int) -> Episode:
        return self._found[int(self.starts[number])][0]

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        _, file, group = self._found[episode.start]
        found = ask(file, "rows", group, [self._places[camera] for camera in cameras], True, list(positions))
        return {camera: self._view(file, camera, rows, positions) for camera, rows in zip(cameras, found)}

    def _view(self, file: Path, camera: str, pictures: Any, positions: Sequence[int]) -> Frames:
        """Decoded, turned, cut out and padded."""
        if isinstance(pictures, list):
            from defi.picture import decode_picture, stack_frames  # as above

            places = [f"{file}: picture {position} of {camera}" for position in positions]
            pictures = stack_frames([decode_picture(*each) for each in zip(pictures, places)], places)
        pictures = pictures[:, ::-1] if self._flip else pictures
        if box := (self._settings.crop or {}).get(camera):
            top, left, height, width = box
            size = "{} x {} pixels (height x width)".format(*pictures.shape[1:3])
            if top + height > pictures.shape[1] or left + width > pictures.shape[2]:
                raise UserError(f"{file}: data.crop.{camera}={box} leaves its pictures of {size}; correct it")
            pictures = pictures[:, top : top + height, left : left + width]
        if self._settings.pad:
            missing = [max(pictures.shape[1:3]) - side for side in pictures.shape[1:3]]
            borders = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
            pictures = np.pad(pictures, [(0, 0), *borders, (0, 0)])
        return np.ascontiguousarray(pictures)

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        start = int(self.starts[np.searchsorted(self.starts, frames.start, "right") - 1])
        _, file, group = self._found[start]
        positions = list(range(frames.start - start, frames.stop - start))
        found = ask(file, "rows", group, [*self._actions, *self._state], False, positions)
        return np.concatenate([rows.reshape(len(rows), -1).astype(np.float32) for rows in found], axis=1)

    def robot(self) -> Robot:
        robot, usual = super().robot(), self._actions == ["actions"] and len(self.action_names) == 7
        if usual and self._layout in (
            LAYOUTS["robomimic"],
            LAYOUTS["libero"],
        ):  # robosuite's: 1 closes, -1 opens
            robot.actions.relative, robot.gripper = [True] * 6 + [False], Gripper(dimension=6, opens=False)
        return robot


def _natural(name: Path | str) -> list[tuple[int, str]]:
    """Sorts demo_2 before demo_10."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]


def _first_tree(files: Sequence[Path]) -> dict[str, tuple[list[int], str]]:
    """Arrays of the first file that can be read."""
    faults = []
    for file in files:
        try:
            return ask(file, "tree")
        except UserError as error:
            faults.append(error)
    raise faults[0]


def _members(tree: dict[str, Any], groups: str) -> dict[str, Any]:
    """Arrays of the first episode, by their paths in it."""
    if not (prefix := groups.strip("/")):
        return tree
    within = [path.removeprefix(f"{prefix}/") for path in tree if path.startswith(f"{prefix}/")]
    first = within[0].partition("/")[0] if within else ""
    rests = [path.removeprefix(f"{first}/") for path in within if path.startswith(f"{first}/")]
    return {rest: tree[f"{prefix}/{first}/{rest}"] for rest in rests}


def _layout(settings: Settings, tree: dict[str, Any], file: Path) -> Layout:
    """The one that is named, or whose pictures a file has."""
    for name, layout in LAYOUTS.items():
        members = _members(tree, layout.groups if settings.groups is None else settings.groups)
        has = any(fnmatchcase(path, layout.pictures) for path in members)
        if has and settings.layout in (None, name):
            return layout
        if settings.layout == name and not settings.cameras:
            raise UserError(
                f"data.layout={name}: {file} has no pictures {layout.pictures}; name data.cameras"
            )
    return LAYOUTS[settings.layout] if settings.layout else OWN


def _matching(named: list[str] | None, usual: Sequence[str], members: dict[str, Any]) -> list[str]:
    """Places of numbers: those that are named, or of the usual ones those that there are."""
    found = [
        path for pattern in usual for path in sorted(members, key=_natural) if fnmatchcase(path, pattern)
    ]
    return found if named is None else named


def _names(places: Sequence[str], shapes: dict[str, list[int]]) -> tuple[str, ...]:
    """Of the columns of some arrays: qpos_0, qpos_1, …"""
    names = []
    for place in places:
        width, name = math.prod(shapes[place][1:]), place.rpartition("/")[2]
        names += [f"{name}_{column}" for column in range(width)] if width > 1 else [name]
    return tuple(distinct(names))


def _episodes(file: Path, *asked: Any) -> list[dict[str, Any]]:
    """Of a file, in natural order; of a damaged one, one that cannot be read."""
    try:
        return sorted(ask(file, "episodes", *asked), key=lambda each: _natural(each["group"]))
    except UserError as error:
        return [{"group": "", "fault": str(error), "shapes": {}, "text": "", "sum": 0}]
