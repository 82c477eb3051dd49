"""VPP's layout: an annotation per episode, which names its texts and its videos, one per camera.

    <root>/annotation/{train,val}/<id>.json    texts, videos, video_length, action(s), state, episode_id
    <root>/videos/{train,val}/<id>/<camera>.mp4
    <root>/latent_videos/{train,val}/<id>/<camera>.safetensors (or .pt): scaled latents [frames, 4, h, w]
    <root>/manifest.json                       of prepared folders: `data.every`, steps between stored frames

`Step1_GFDM.prepare` writes it too. VPP's own CALVIN has annotation_abc_13/{train,val_d} instead.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from defi.data.episode import DataSettings, Part, distinct, file_name, file_stamp
from defi.data.videos import VideoData
from defi.errors import UserError, one_line, reading
from defi.files import as_list, inside, read_json
from defi.instructions import read_instructions
from defi.processes import print_once

MANIFEST = "manifest.json"
MOST_FRAMES = 10**8  # of a video: more than a month
AGAIN = "run Step1_GFDM.prepare again"
FIX = "copy it again, or remove it"
VECTORS = ("action", "state")  # keys of an annotation, or in the plural


@dataclass(frozen=True, slots=True)
class Annotation:
    """An episode as its file says; paths within the data set. frames: None: it does not say.

    shapes: of each of `VECTORS` the rows, and the numbers in a row; (0, 0) where there are none.
    """

    id: str
    texts: list[str]
    frames: int | None
    latents: list[str]
    videos: list[str]
    shapes: dict[str, tuple[int, int]]


class NotJSON(UserError):
    """An annotation that is none: left out, as the published code does."""


def _load(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise NotJSON(f"{file}: not JSON ({one_line(error)}); {FIX}") from None


def _rows(values: Mapping[str, Any], vector: str) -> list[list[float]]:
    """Of actions or state, a row per frame."""
    rows = values.get(vector, values.get(f"{vector}s"))
    return rows if isinstance(rows, list) and rows and isinstance(rows[0], list) else []


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
        found = {vector: _rows(values, vector) for vector in VECTORS}
        shapes = {vector: (len(rows), len(rows[0]) if rows else 0) for vector, rows in found.items()}
        name = str(values.get("episode_id", file.stem))
        return Annotation(name, texts, int(frames) or None, latents, videos, shapes)


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


class VPPData(VideoData):
    """An episode per annotation; of several texts it has the first.

    Actions and state are read where every annotation has a row of them for each frame. Cameras are the names
    of the videos' files without suffix; their numbers from 0, where names repeat.
    """

    def __init__(self, root: Path, split: str, places: Mapping[str, str]) -> None:
        self.root, self.scope, self.stored_step = root, f"{root} ({split})", stored_step(root)
        said = read_annotations(root, split)
        names = distinct(file_name(file.stem) for file in said)
        self.fingerprint = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        self.stamp = file_stamp(said)
        views = {file: _views(each) for file, each in said.items()}
        usual = next(filter(None, views.values()), {})  # the first that can be read says what the cameras are
        places = dict(places) or {camera: camera for camera in usual}
        if usual and (unknown := set(places.values()) - usual.keys()):
            raise UserError(f"data.cameras: {min(unknown)!r} is no camera; choose from {', '.join(usual)}")
        self.cameras = tuple(places)
        self.left_out = [f"the camera {c} (data.cameras)" for c in usual if c not in places.values()]
        found: dict[str, tuple[str, list[Path] | str]] = {}
        for name, (file, each) in zip(names, said.items()):
            if isinstance(each, UserError):
                found[name] = "", str(each)
            elif not views[file]:
                found[name] = "", f"{file}: names no videos; list them, or remove this annotation"
            elif list(views[file]) != list(usual):
                found[name] = "", f"{file}: has the videos {list(views[file])}, others {list(usual)}"
            else:
                found[name] = each.texts[0], [root / views[file][place] for place in places.values()]
        self.take(root, found)
        annotations = dict(zip(names, said.items()))
        self._said = {each.start: annotations[each.name] for each in self._episodes}
        self.action_names, self.state_names = (self._names(vector) for vector in VECTORS)
        several = sum(len(each.texts) > 1 for each in said.values() if isinstance(each, Annotation))
        told = f"{several} of {len(said)} annotations have several texts: the first counts, as published"
        print_once(f"{root}: {told}" if several else "")

    def _names(self, vector: str) -> tuple[str, ...]:
        shapes = [said.shapes[vector] for _, said in self._said.values()]
        width = shapes[0][1]
        if shapes == [(length, width) for length in self.lengths.tolist()]:
            return tuple(f"{vector}_{number}" for number in range(width))
        if any(rows for rows, _ in shapes):
            print_once(f"{self.root}: {vector} is not read: not every frame has a row of it, of one length")
        return ()

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        start = int(self.starts[np.searchsorted(self.starts, frames.start, side="right") - 1])
        file, wanted = self._said[start][0], slice(frames.start - start, frames.stop - start)
        with reading(file, "correct its actions and state, or remove it"):
            values, names = _load(file), zip(VECTORS, (self.action_names, self.state_names))
            rows = [np.array(_rows(values, vector)[wanted], np.float32) for vector, has in names if has]
            return np.concatenate(rows, axis=1)


def _views(said: Annotation | UserError) -> dict[str, str]:
    """The videos of an annotation by camera; none of one that cannot be read."""
    videos = [] if isinstance(said, UserError) else said.videos
    names = [Path(video).stem for video in videos]
    return dict(zip(names if len(set(names)) == len(names) else map(str, range(len(names))), videos))
