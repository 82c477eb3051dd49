"""Captioned video of any kind, for `Step1_GFDM.prepare`.

A source is a class here, listed in `SOURCES`, with a file configs/data/captioned_<name>.yaml of its settings.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import UInt8

from defi.data.calvin import CalvinFolder, Span
from defi.config import typed
from defi.errors import UserError, reading
from defi.files import find_files
from defi.data.hdf5 import read_hdf5
from defi.instructions import read_instruction, read_instructions
from defi.picture import decode_picture, stack_frames
from defi.data.rlds import RLDSDataset, default_splits
from defi.video import frame_count, read_video
from Step1_GFDM.config import check_rate
from Step1_GFDM.data import annotation_files, as_list, inside, read_episode, stored_step

HELD_OUT_EVERY = 20  # where a source does not name its held-out part, every 20th recording is
LONGEST_NAME = 180  # bytes; folders take 255, with endings and the marks of unfinished files
CALVIN_FPS, CALVIN_CAMERAS = 30, ["static", "gripper"]
HDF5_SUFFIXES = (".hdf5", ".h5")

Frames = UInt8[np.ndarray, "F H W 3"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Scene:
    """What a recording shows: frames per camera (of one length), what happens in words, frames per second."""

    views: dict[str, Frames]
    texts: list[str]
    fps: float


@dataclass(frozen=True)
class Recordings:
    """One split. read: name, fit for a file → what reads it (UserError if damaged)."""

    read: dict[str, Callable[[], Scene]]
    cameras: list[str]
    fingerprint: str


@dataclass
class Source:
    """The settings of a source, the `data` section of a configuration; each kind of source is a subclass.

    splits: ours -> the source's. every: take every n-th frame. Clips are made of what is taken:
    `Step1_GFDM.data` finds it in the manifest.
    """

    known_by_names: ClassVar[bool] = False  # the fingerprint is of names alone: other files may have the same

    source: str
    root: str
    splits: dict[str, str | None]
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"data.every={self.every}: must be at least 1")
        check_rate("data.fps", getattr(self, "fps", 1))  # some recordings do not say theirs

    def open(self, split: str) -> Recordings:
        """Recordings of our split `train` or `val`. Raises UserError for what is missing."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What decides how episodes look, for JSON; the place only where the fingerprint may not tell."""
        values = {key: value for key, value in asdict(self).items() if key not in ("root", "index")}
        return values | ({"root": str(Path(self.root).resolve())} if self.known_by_names else {})

    def theirs(self, split: str) -> str:
        """What the source calls our split. Raises UserError if the settings do not say."""
        if not (name := self.splits.get(split)):
            raise UserError(f"data.splits.{split}={name}: give what data.source={self.source} calls it")
        return name

    def place_and_part(self, split: str) -> tuple[Path, bool | None]:
        """Of files that may know no splits: where ours lies; which `part` of it, where `val` has no name."""
        named = self.splits.get("val") is not None
        return Path(self.root, self.theirs(split if named else "train")), None if named else split == "val"


@dataclass
class Calvin(Source):
    """Annotated spans of demonstrations in CALVIN's format. splits: folders below root."""

    def open(self, split: str) -> Recordings:
        data = CalvinFolder(Path(self.root, self.theirs(split)))
        read = {f"{number:06d}": partial(self._read, data, span) for number, span in enumerate(data.spans)}
        return Recordings(read, CALVIN_CAMERAS, data.fingerprint)

    def _read(self, data: CalvinFolder, span: Span) -> Scene:
        if span.fault:
            raise UserError(span.fault)
        frames = range(span.start, span.end + 1, self.every)
        views = {camera: data.stack(f"rgb_{camera}", frames) for camera in CALVIN_CAMERAS}
        return Scene(views, [span.instruction], CALVIN_FPS / self.every)


@dataclass
class RLDS(Source):
    """Episodes of an RLDS data set (Open X-Embodiment). splits: as TFDS names them; None: `default_splits`.

    cameras: our name of each camera -> its key under `steps/observation`; None: the only picture, `static`.
    language: instruction, a path under `steps`; None: where data sets usually keep it.
    fps: of the recordings, which do not say. index: where the places of pictures are kept.
    """

    cameras: dict[str, str | None] | None = None
    language: str | None = None
    fps: float = 30
    index: str = ""

    def open(self, split: str) -> Recordings:
        theirs = self.splits.get(split) or default_splits(self.root)[split == "val"]
        data = RLDSDataset(self.root, theirs, index=self.index)
        pictures = {camera: data.picture(key) for camera, key in (self.cameras or {"static": None}).items()}
        if (language := data.language(self.language)) is None:
            raise UserError(f"{data.folder}: its steps hold no instruction; stage 1 needs captions")

        def read(episode: int) -> Scene:
            where = f"{data.shard(episode)}: episode {data.first + episode:06d}"
            text = read_instruction(data.text(episode, language), where)
            if not text:
                raise UserError(f"{where} has no instruction")
            steps = range(0, int(data.lengths[episode]), self.every)
            views = {camera: data.frames(episode, steps, picture) for camera, picture in pictures.items()}
            return Scene(views, [text], self.fps / self.every)

        episodes = {f"{data.first + number:06d}": partial(read, number) for number in range(len(data))}
        return Recordings(episodes, list(pictures), data.fingerprint)


@dataclass
class VPP(Source):
    """VPP's layout without latents: one recording per annotation. splits: folders below annotation.

    Cameras are the names of its videos' files without suffix; their numbers from 0, where names repeat.
    """

    known_by_names = True

    def identity(self) -> dict[str, Any]:
        """The videos may themselves lack frames of the recording: those of a folder that was prepared."""
        return super().identity() | {"every": self.every * stored_step(Path(self.root))}

    def open(self, split: str) -> Recordings:
        files = annotation_files(Path(self.root), self.theirs(split))
        for file in files:  # the first that can be read says what the cameras are
            with suppress(UserError):
                cameras = list(self._texts_and_videos(file)[1])
                break
        else:
            self._texts_and_videos(files[0])  # raises
        read = distinct((shortened(file.stem), partial(self._read, file, cameras)) for file in files)
        return Recordings(read, cameras, _digest("\n".join(read)))

    def _texts_and_videos(self, file: Path) -> tuple[list[str], dict[str, Path]]:
        episode = read_episode(Path(self.root), file)
        if not episode.videos:
            raise UserError(f"{file}: names no videos; list them, or remove this annotation")
        names = [Path(video).stem for video in episode.videos]
        if len(set(names)) < len(names):
            names = [str(number) for number in range(len(names))]
        return episode.texts, {name: Path(self.root, video) for name, video in zip(names, episode.videos)}

    def _read(self, file: Path, cameras: list[str]) -> Scene:
        texts, videos = self._texts_and_videos(file)
        if list(videos) != cameras:
            raise UserError(f"{file}: has the videos {list(videos)}, others {cameras}")
        found = {camera: read_video(video, self.every) for camera, video in videos.items()}
        shortest = min(len(frames) for frames, _ in found.values())
        views = {camera: frames[:shortest] for camera, (frames, _) in found.items()}
        return Scene(views, texts, found[cameras[0]][1] / self.every)


@dataclass
class Videos(Source):
    """A folder of videos and a file that says what each shows (`read_captions`): one recording per caption.

    splits: files with captions below root; where `val` is None, those of every 20th video are held out.
    videos: folder below root that the captions' names of videos start from.
    longest: frames; longer videos are left out when they are read. The only camera is `rgb`.
    """

    known_by_names = True

    videos: str = "."
    longest: int | None = None

    def open(self, split: str) -> Recordings:
        (captions, held_out), videos = self.place_and_part(split), Path(self.root, self.videos)
        if not videos.is_dir():
            raise UserError(f"{videos}: no such folder; give the folder of the videos as data.videos")
        said = [(name, inside(videos, name), texts) for name, texts in read_captions(captions)]
        kept = set(part(list(dict.fromkeys(file for _, file, _ in said)), held_out))
        said = [each for each in said if each[1] in kept]
        read = distinct(
            (file_name(name.rpartition(".")[0] or name), partial(self._read, videos / file, texts))
            for name, file, texts in said
        )
        return Recordings(read, ["rgb"], _digest(json.dumps([(name, texts) for name, _, texts in said])))

    def _read(self, path: Path, texts: list[str]) -> Scene:
        if not texts:
            raise UserError(f"{path}: its caption is blank")
        if self.longest is not None and (frames := frame_count(path)) > self.longest:
            raise UserError(f"{path}: has {frames} frames, data.longest={self.longest} leaves it out")
        frames, rate = read_video(path, self.every)
        return Scene({"rgb": frames}, texts, rate / self.every)


def read_captions(file: Path) -> list[tuple[str, list[str]]]:
    """Name of each video, and its texts: none where they are blank.

    captions.jsonl   a line per video: {"video": "kitchen/1.mp4", "text": "open it"}, or "texts": [...]
    captions.csv     the columns `video` and `text`
    labels.json      Something-Something's: [{"id": "78687", "label": "holding potato next to vicks"}, ...]
    """
    kind, found = file.suffix.lower(), []
    if kind not in (".jsonl", ".csv", ".json"):
        raise UserError(
            f"{file}: captions are read from .jsonl, .csv, .json; give such a file as data.splits"
        )
    with reading(file, "give the captions of the videos, in UTF-8, as data.splits"):
        content = file.read_text("utf-8-sig")  # spreadsheets begin their files with a mark, others do not
        if kind == ".csv":
            entries = list(csv.DictReader(io.StringIO(content)))
        elif kind == ".json":
            labels = as_list(json.loads(content))
            entries = [{"video": f"{each['id']}.webm", "text": each["label"]} for each in labels]
        else:
            entries = []
            for number, line in enumerate(content.split("\n"), 1):
                with reading(f"{file}: line {number}", 'it must be JSON, {"video": …, "text": …}'):
                    entries += [json.loads(line)] if line.strip() else []
        for number, entry in enumerate(entries, 1):
            place, video = f"{file}: entry {number}", entry.get("video")
            texts = as_list(entry.get("texts", entry.get("text")))
            if not isinstance(video, str) or not video or not texts or None in texts:
                raise UserError(f"{place}: a video or its caption is missing; give each as video and text")
            texts = read_instructions(texts, f"{place}: the caption")
            found.append((video, [text.strip() for text in texts]))
    if not any(texts for _, texts in found):
        raise UserError(f"{file}: no captions in it; one line per video is expected")
    return found


@dataclass
class HDF5(Source):
    """Teleoperation episodes in HDF5 files (ALOHA's, robomimic's and the like): one per file, or per group.

    A camera's pictures are a data set of the file or group: uint8 [F, H, W, 3]; or one encoded picture per
    row, padded with zeros ([F, bytes]) or of varying length.

    splits: folders below root; where `val` is None, every 20th recording is held out.
    cameras: our name of each camera -> path of its pictures within an episode.
    text: path of a text or an attribute, of an episode or of what is around or within it.
    instruction: the text of all episodes, instead. fps: of the recordings.
    groups: path of the group whose members are the episodes of a file; None: a file is an episode.
    crop: camera -> [top, left, height, width] in pixels, cut out first.
    pad: make pictures square with black borders, so that resizing does not squeeze them.
    """

    known_by_names = True

    cameras: dict[str, str] = field(default_factory=dict)
    text: str = ""
    instruction: str | None = None
    fps: float = 30
    groups: str | None = None
    crop: dict[str, list[int]] | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cameras:
            raise UserError("data.cameras={}: name at least one, {name: path of its pictures in an episode}")
        for camera, box in (self.crop or {}).items():
            if camera not in self.cameras or len(box) != 4 or min(box) < 0 or min(box[2:]) < 1:
                raise UserError(
                    f"data.crop.{camera}={box}: give one of the cameras ({', '.join(self.cameras)}) "
                    "[top, left, height, width] in pixels, height and width at least 1"
                )

    def open(self, split: str) -> Recordings:
        folder, held_out = self.place_and_part(split)
        files, found = find_files(folder, HDF5_SUFFIXES), []
        if not files:
            raise UserError(f"{folder}: no HDF5 files here ({', '.join(HDF5_SUFFIXES)}); check data.root")
        for file in files:
            parts = file.relative_to(folder).with_suffix("").parts
            within = [] if self.groups is None else [self.groups]
            groups = [within]  # of a damaged file, where they would be
            if within:
                with suppress(UserError):
                    members = read_hdf5(file, group=within[0], cameras={}, text="", every=1).members
                    groups = [[*within, name] for name in members]
            for group in groups:
                name = file_name("-".join([*parts, *group]))
                found.append((name, partial(self._read, file, "/".join(group))))
        read = distinct(part(found, held_out))
        return Recordings(read, list(self.cameras), _digest("\n".join(read)))

    def _read(self, path: Path, group: str) -> Scene:
        wanted = "" if self.instruction else self.text
        found = read_hdf5(path, group=group, cameras=self.cameras, text=wanted, every=self.every)
        text = self.instruction or found.text
        if not text:
            raise UserError(f"{path}: no text {self.text} in it; set data.text or data.instruction")
        lengths = {camera: len(pictures) for camera, pictures in found.pictures.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise UserError(f"{path}: cameras of different or no length: {lengths}")
        views = {camera: self._view(path, camera, pictures) for camera, pictures in found.pictures.items()}
        return Scene(views, [text], self.fps / self.every)

    def _view(self, path: Path, camera: str, pictures: Frames | list[bytes]) -> Frames:
        """Decoded, cut out and padded."""
        if isinstance(pictures, list):
            places = [f"{path}: picture {number} of {camera}" for number in range(len(pictures))]
            pictures = stack_frames([decode_picture(*each) for each in zip(pictures, places)], places)
        if box := (self.crop or {}).get(camera):
            top, left, height, width = box
            size = "{} x {} pixels (height x width)".format(*pictures.shape[1:3])
            if top + height > pictures.shape[1] or left + width > pictures.shape[2]:
                raise UserError(f"{path}: data.crop.{camera}={box} leaves its pictures of {size}; correct it")
            pictures = pictures[:, top : top + height, left : left + width]
        if self.pad:
            missing = [max(pictures.shape[1:3]) - side for side in pictures.shape[1:3]]
            borders = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
            pictures = np.pad(pictures, [(0, 0), *borders, (0, 0)])
        return pictures


SOURCES = {"calvin": Calvin, "hdf5": HDF5, "rlds": RLDS, "videos": Videos, "vpp": VPP}


def read_source(data: Mapping[str, Any]) -> Source:
    """From the `data` section of a configuration."""
    if data["source"] not in SOURCES:
        raise UserError(f"data.source={data['source']}: choose from {', '.join(SOURCES)}")
    return typed(SOURCES[data["source"]], data, "data")


def part(items: Sequence[Item], held_out: bool | None) -> list[Item]:
    """All items (None), every 20th or of fewer the last (True), or the others (False); of one always that."""
    if held_out is None or len(items) < 2:
        return list(items)
    chosen = set(range(HELD_OUT_EVERY - 1, len(items), HELD_OUT_EVERY)) or {len(items) - 1}
    return [item for number, item in enumerate(items) if (number in chosen) == held_out]


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def file_name(text: str) -> str:
    """A text as a file's name: what is not a letter, digit, dot or dash becomes an underscore."""
    return shortened(re.sub(r"[^\w.\-]+", "_", text).strip("._") or "_")


def shortened(name: str) -> str:
    """Of a name that is too long for a file, or not UTF-8, the start is kept, and a hash of all of it."""
    start = os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore")
    return name if start == name else f"{start}-{_digest(name)}"


def distinct(pairs: Iterable[tuple[str, Item]]) -> dict[str, Item]:
    """By name, with numbers after names that occur more than once; no number makes another item's name."""
    pairs = list(pairs)
    given = {name for name, _ in pairs}
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))
    found: dict[str, Item] = {}
    for name, item in pairs:
        if name in found:
            name = next(new for n in numbers[name] if (new := f"{name}-{n}") not in given)
        found[name] = item
    return found
