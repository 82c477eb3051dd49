"""Teleoperation episodes in HDF5 files (ALOHA's, robomimic's and the like): pictures per camera, raw or JPEG.

A camera's pictures are a data set of the file (or of a group, where a file holds several episodes):
uint8 [F, H, W, 3]; or one encoded picture per row, padded with zeros ([F, bytes]) or of varying length.
Needs the package h5py.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from defi.errors import UserError
from Step1_GFDM.sources.recordings import Recording, Scene, distinct, file_name, part

if TYPE_CHECKING:
    import h5py

SUFFIXES = (".hdf5", ".h5")


class HDF5Episodes:
    """One recording per file below `folder`, or per group of each file.

    Args:
        cameras: our name of each camera -> path of its pictures within an episode.
        text: path of a text, or name of an attribute, of an episode or of its file.
        instruction: the text of all episodes, instead.
        groups: path of the group whose members are the episodes of a file; None: a file is an episode.
        crop: camera -> [top, left, height, width] in pixels, cut out first.
        pad: make pictures square with black borders, so that resizing does not squeeze them.
        held_out: None: all files; True: every 20th recording, False: the others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cameras: Mapping[str, str],
        text: str,
        instruction: str | None,
        fps: float,
        groups: str | None = None,
        crop: Mapping[str, Sequence[int]] | None = None,
        pad: bool = False,
        held_out: bool | None = None,
    ) -> None:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{folder}: no HDF5 files here ({', '.join(SUFFIXES)}); check data.root")
        for camera, box in (crop or {}).items():
            if camera not in cameras or len(box) != 4 or min(box) < 0:
                raise UserError(
                    f"data.crop.{camera}={box}: give one of the cameras [top, left, height, width]"
                )
        self.paths, self.text, self.instruction, self.fps = dict(cameras), text, instruction, fps
        self.crop, self.pad = dict(crop or {}), pad
        self.cameras = list(cameras)
        found = [
            Recording(
                file_name("-".join([*file.relative_to(folder).with_suffix("").parts, *group])), (file, group)
            )
            for file in files
            for group in _groups(file, groups)
        ]
        self.recordings = distinct(part(found, held_out))

    @property
    def fingerprint(self) -> str:
        """Hash of the recordings' names."""
        return hashlib.sha256("\n".join(r.id for r in self.recordings).encode()).hexdigest()[:16]

    def read(self, recording: Recording, every: int) -> Scene:
        path, group = recording.place
        with opened(path) as file:
            episode = find(file, "/".join(group)) if group else file
            views = {
                camera: self._frames(find(episode, place), camera, every)
                for camera, place in self.paths.items()
            }
            text = self.instruction or _text(episode, self.text) or _text(file, self.text)
        if not text:
            raise UserError(f"{path}: no text {self.text} in it; set data.text or data.instruction")
        lengths = {camera: len(frames) for camera, frames in views.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise UserError(f"{path}: cameras of different or no length: {lengths}")
        return Scene(views, [text], self.fps / every)

    def _frames(self, data: "h5py.Dataset", camera: str, every: int) -> UInt8[np.ndarray, "F H W 3"]:
        if data.ndim == 4 and data.dtype == np.uint8 and data.shape[-1] == 3:
            frames = data[::every]
        elif data.ndim in (1, 2):
            frames = np.stack([_decode(row) for row in data[::every]])
        else:
            raise UserError(
                f"{data.file.filename}: {data.name} is {data.dtype} {data.shape}, not pictures: "
                "uint8 [F, H, W, 3], or encoded ones"
            )
        if camera in self.crop:
            top, left, height, width = self.crop[camera]
            frames = frames[:, top : top + height, left : left + width]
        return _square(frames) if self.pad else frames


@contextmanager
def opened(path: Path) -> Iterator["h5py.File"]:
    """An HDF5 file to read from; what is wrong with it is a UserError."""
    try:
        import h5py
    except ImportError:
        raise UserError("data.source=hdf5: needs the package h5py; pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, or not as data.cameras says ({reason}); copy it again") from None


def find(group: "h5py.Group", path: str) -> Any:
    """A member of a file. Links that lead out of the file are not followed.

    Raises:
        UserError: there is no such member, or it lies in another file.
    """
    import h5py

    for name in path.strip("/").split("/"):
        if not isinstance(group, h5py.Group) or name not in group:
            raise UserError(f"{group.file.filename}: has no {path}; {group.name} holds {_members(group)}")
        if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            raise UserError(f"{group.file.filename}: {path} leads out of the file; this data set is not safe")
        group = group[name]
    if isinstance(group, h5py.Dataset) and (group.external or group.is_virtual):
        raise UserError(f"{group.file.filename}: {path} leads out of the file; this data set is not safe")
    return group


def _members(group: Any) -> str:
    return ", ".join(group.keys()) if hasattr(group, "keys") else "an array"


def _groups(path: Path, groups: str | None) -> list[list[str]]:
    """Places of a file's episodes; of a damaged file the place where they would be."""
    if groups is None:
        return [[]]
    try:
        with opened(path) as file:
            return [[groups, name] for name in find(file, groups)]
    except UserError:
        return [[groups]]


def _text(group: Any, name: str) -> str | None:
    value = group.attrs.get(name)
    if value is None and name in group:
        value = find(group, name)[()]
    if isinstance(value, np.ndarray):
        value = value.flat[0] if value.size else None
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return text.strip() if isinstance(text, str) else None


def _decode(row: Any) -> UInt8[np.ndarray, "H W 3"]:
    """An encoded picture; zeros after its end do no harm."""
    return np.asarray(Image.open(io.BytesIO(bytes(np.asarray(row)))).convert("RGB"))


def _square(frames: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F S S 3"]:
    height, width = frames.shape[1:3]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(frames, [(0, 0), (top, side - height - top), (left, side - width - left), (0, 0)])
