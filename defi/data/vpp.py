"""VPP's layout: an annotation per episode, which names its texts and its videos, one per camera.

    <root>/annotation/{train,val}/<id>.json    texts, videos, video_length, action(s), state, episode_id
    <root>/videos/{train,val}/<id>/<camera>.mp4
    <root>/latent_videos/{train,val}/<id>/<camera>.safetensors (or .pt): scaled latents [frames, 4, h, w]
    <root>/manifest.json                       of prepared folders: `data.every`, steps between stored frames

`Step1_GFDM.prepare` writes it too. VPP's own CALVIN has annotation_abc_13/{train,val_d} instead.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from defi.data.episode import Dataset, DataSettings, Episode, Frames, Part, distinct, file_name
from defi.errors import UserError, one_line, reading
from defi.files import as_list, inside, read_json
from defi.instructions import read_instructions
from defi.processes import print_once
from defi.video import read_frames
from defi.video_index import number_videos

MANIFEST = "manifest.json"
MOST_FRAMES = 10**8  # of a video: more than a month
AGAIN = "run Step1_GFDM.prepare again"
FIX = "copy it again, or remove it"


@dataclass(frozen=True, slots=True)
class Annotation:
    """An episode as its file says; paths within the data set. frames: None: it does not say.

    actions, state: rows and numbers in a row, (0, 0) where there are none.
    """

    id: str
    texts: list[str]
    frames: int | None
    latents: list[str]
    videos: list[str]
    actions: tuple[int, int]
    state: tuple[int, int]


class NotJSON(UserError):
    """An annotation that is none: left out, as the published code does."""


def _load(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise NotJSON(f"{file}: not JSON ({one_line(error)}); {FIX}") from None


def _vectors(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Actions and state of an annotation, lists of rows."""
    return values.get("actions", values.get("action", [])), values.get("state", [])


def _shape(rows: Any) -> tuple[int, int]:
    has_rows = isinstance(rows, list) and rows and isinstance(rows[0], list)
    return (len(rows), len(rows[0])) if has_rows else (0, 0)


def read_annotation(root: Path, file: Path) -> Annotation:
    """One annotation, with or without latents. Its length: one `state` per frame, else `video_length`."""
    with reading(file, FIX):
        values = _load(file)
        texts = read_instructions(as_list(values["texts"]), f"{file}: a text")
        if not texts:
            raise UserError(f"{file}: has no caption; stage 1 needs texts")
        frames = len(values["state"]) if "state" in values else values.get("video_length", 0)
        if not 0 <= frames <= MOST_FRAMES:
            raise UserError(f"{file}: video_length={frames}: no video is that long; give its frames")
        latents = [
            inside(root, each["latent_video_path"]) for each in as_list(values.get("latent_videos", []))
        ]
        videos = [inside(root, each["video_path"]) for each in as_list(values["videos"])]
        name, shapes = str(values.get("episode_id", file.stem)), map(_shape, _vectors(values))
        return Annotation(name, texts, int(frames) or None, latents, videos, *shapes)


def read_annotations(root: Path, split: str) -> dict[Path, Annotation | UserError]:
    """All of a split, by name, or what is wrong with them. UserError if there are none."""

    def read(file: Path) -> Annotation | UserError:
        try:
            return read_annotation(root, file)
        except UserError as error:
            return error

    of_calvin = root / "annotation_abc_13" / {"val": "val_d"}.get(split, split)
    folder = of_calvin if of_calvin.is_dir() else root / "annotation" / split
    files = sorted(folder.glob("[!.]*.json"))
    if not files:
        raise UserError(f"{folder}: no annotations; make them with Step1_GFDM.prepare")
    with ThreadPoolExecutor(8) as pool:  # a hundred thousand small files, perhaps over a network
        return dict(zip(files, pool.map(read, files)))


def read_manifest(root: Path) -> dict[str, Any]:
    """Of a prepared folder; of VPP's own sets, which have none, what may be taken for granted."""
    file = root / MANIFEST
    return read_json(file, AGAIN) if file.is_file() else {"data": {"every": 1}}


def stored_step(root: Path) -> int:
    """Steps of the recording from one stored frame to the next."""
    data = read_manifest(root).get("data")
    step = data.get("every") if isinstance(data, dict) else None
    if not isinstance(step, int) or step < 1:
        raise UserError(f"{root / MANIFEST}: data.every={step}: must be the step between frames; {AGAIN}")
    return step


# ---------------------------------------------------------------- as data of every stage


@dataclass(kw_only=True)
class Settings(DataSettings):
    """`split` and `held_out` are folders of annotations."""

    split: str | None = "train"
    held_out: str | None = "val"

    def open(self, part: Part) -> "VPPData":
        split = self.held_out if part == "held_out" else self.split
        return VPPData(Path(self.root), split or "train", self.places())


class VPPData(Dataset):
    """An episode per annotation, as long as the shortest of its videos, and as its actions and state, which
    are read where all have as many numbers of them. Of several texts it has the first.

    Cameras are the names of the videos' files without suffix; their numbers from 0, where names repeat.
    """

    known_by_names = True

    def __init__(self, root: Path, split: str, places: Mapping[str, str]) -> None:
        self.root, self.scope, self.stored_step = root, f"{root} ({split})", stored_step(root)
        said = read_annotations(root, split)
        names = distinct(file_name(file.stem) for file in said)
        self.fingerprint = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        views = {file: _views(root, file, each) for file, each in said.items()}
        usual = next((each for each in views.values() if isinstance(each, dict)), None)
        if usual is None:
            raise next(iter(views.values()))
        self._places = dict(places) or {camera: camera for camera in usual}
        self.cameras = tuple(self._places)
        if unknown := set(self._places.values()) - usual.keys():
            raise UserError(f"data.cameras: {min(unknown)!r} is no camera; choose from {', '.join(usual)}")
        self.left_out = [f"the camera {c} (data.cameras)" for c in usual if c not in self._places.values()]
        paths = list(
            {path: None for each in views.values() if isinstance(each, dict) for path in each.values()}
        )
        numbered = dict(zip(paths, number_videos(root, paths)))
        self.faults, self._found, lengths = {}, [], []
        for name, (file, each) in zip(names, views.items()):
            if isinstance(each, dict) and each.keys() != usual.keys():
                each = UserError(f"{file}: has the videos {list(each)}, others {list(usual)}")
            numberings = [each] if isinstance(each, UserError) else [numbered[path] for path in each.values()]
            if fault := next((one for one in numberings if isinstance(one, UserError)), None):
                self.faults[name] = str(fault)
                continue
            self._found.append((name, file, said[file].texts[0], each))
            lengths.append(min(numbering.frames for numbering in numberings))
        if not lengths:
            raise UserError(next(iter(self.faults.values())))
        self._numbered = numbered
        read = [said[file] for _, file, _, _ in self._found]
        self.action_names = self._names("action", [each.actions[1] for each in read])
        self.state_names = self._names("state", [each.state[1] for each in read])
        rows = np.array(lengths, np.int64)
        rows = np.minimum(rows, [each.actions[0] for each in read]) if self.action_names else rows
        rows = np.minimum(rows, [each.state[0] for each in read]) if self.state_names else rows
        if cut := int((rows < lengths).sum()):
            print_once(f"{root}: {cut} of {len(rows)} episodes end where their actions or state do")
        self.lengths, self.starts = rows, np.cumsum(rows) - rows

    def _names(self, name: str, widths: list[int]) -> tuple[str, ...]:
        if len(set(widths)) > 1:
            print_once(f"{self.root}: {name} not read: annotations have {sorted(set(widths))} numbers of it")
            return ()
        return tuple(f"{name}_{number}" for number in range(widths[0]))

    def episode(self, number: int) -> Episode:
        name, _, text, _ = self._found[number]
        return Episode(name, int(self.starts[number]), int(self.lengths[number]), (text,))

    def _at(self, start: int) -> tuple[str, Path, str, dict[str, Path]]:
        return self._found[int(np.searchsorted(self.starts, start, side="right")) - 1]

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        videos = self._at(episode.start)[3]
        paths = {camera: videos[self._places[camera]] for camera in cameras}
        return {c: read_frames(path, positions, self._numbered[path]) for c, path in paths.items()}

    def rate(self, episode: Episode) -> float:
        path = self._at(episode.start)[3][self._places[self.cameras[0]]]
        return self._numbered[path].fps(path)

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        start = int(self.starts[np.searchsorted(self.starts, frames.start, side="right") - 1])
        file, first = self._at(start)[1], frames.start - start
        with reading(file, "correct its actions and state, or remove it"):
            rows = zip(_vectors(_load(file)), (self.action_names, self.state_names))
            wanted = slice(first, first + len(frames))
            found = [np.array(values[wanted], np.float32) for values, names in rows if names]
            return np.concatenate(found, axis=1)


def _views(root: Path, file: Path, said: Annotation | UserError) -> dict[str, Path] | UserError:
    """The videos of an annotation by camera."""
    if isinstance(said, UserError) or not said.videos:
        nothing = UserError(f"{file}: names no videos; list them, or remove this annotation")
        return said if isinstance(said, UserError) else nothing
    names = [Path(video).stem for video in said.videos]
    names = names if len(set(names)) == len(names) else [str(number) for number in range(len(names))]
    return {name: root / video for name, video in zip(names, said.videos)}
