"""Teleoperation episodes in HDF5 files (ALOHA's, robomimic's and the like): pictures per camera, raw or JPEG.

A camera's pictures are a data set of the file (or of a group, where a file holds several episodes):
uint8 [F, H, W, 3]; or one encoded picture per row, padded with zeros ([F, bytes]) or of varying length.
Needs the package h5py.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.files import find_files
from defi.hdf5 import read_hdf5
from defi.picture import decode_picture, stack_frames
from Step1_GFDM.sources.recordings import Recording, Scene, distinct, file_name, part

SUFFIXES = (".hdf5", ".h5")


class HDF5Episodes:
    """One recording per file below `folder`, or per group of each file.

    Args:
        cameras: our name of each camera -> path of its pictures within an episode.
        text: path of a text or an attribute, of an episode or of what is around or within it.
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
        files = find_files(folder, SUFFIXES)
        if not files:
            raise UserError(f"{folder}: no HDF5 files here ({', '.join(SUFFIXES)}); check data.root")
        for camera, box in (crop or {}).items():
            if camera not in cameras or len(box) != 4 or min(box) < 0 or min(box[2:]) < 1:
                raise UserError(
                    f"data.crop.{camera}={box}: give one of the cameras ({', '.join(cameras)}) "
                    "[top, left, height, width] in pixels, height and width at least 1"
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
        text = "" if self.instruction else self.text
        found = read_hdf5(path, group="/".join(group), cameras=self.paths, text=text, every=every)
        text = self.instruction or found.text
        if not text:
            raise UserError(f"{path}: no text {self.text} in it; set data.text or data.instruction")
        lengths = {camera: len(pictures) for camera, pictures in found.pictures.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise UserError(f"{path}: cameras of different or no length: {lengths}")
        views = {camera: _decoded(path, camera, pictures) for camera, pictures in found.pictures.items()}
        views = {camera: self._cropped(path, camera, frames) for camera, frames in views.items()}
        return Scene(views, [text], self.fps / every)

    def _cropped(
        self, path: Path, camera: str, frames: UInt8[np.ndarray, "F H W 3"]
    ) -> UInt8[np.ndarray, "F H2 W2 3"]:
        """Cut out and padded as the settings say. Raises UserError for a crop that leaves the pictures."""
        if camera in self.crop:
            top, left, height, width = box = self.crop[camera]
            if top + height > frames.shape[1] or left + width > frames.shape[2]:
                raise UserError(
                    f"{path}: data.crop.{camera}={box} leaves its pictures of {frames.shape[1]} x "
                    f"{frames.shape[2]} pixels (height x width); give [top, left, height, width] within them"
                )
            frames = frames[:, top : top + height, left : left + width]
        return _square(frames) if self.pad else frames


def _decoded(path: Path, camera: str, pictures: np.ndarray | list[bytes]) -> UInt8[np.ndarray, "F H W 3"]:
    if not isinstance(pictures, list):
        return pictures
    places = [f"{path}: picture {number} of {camera}" for number in range(len(pictures))]
    return stack_frames([decode_picture(*each) for each in zip(pictures, places)], places)


def _groups(path: Path, groups: str | None) -> list[list[str]]:
    """Places of a file's episodes; of a damaged file the place where they would be."""
    if groups is None:
        return [[]]
    try:
        return [
            [groups, name] for name in read_hdf5(path, group=groups, cameras={}, text="", every=1).members
        ]
    except UserError:
        return [[groups]]


def _square(frames: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F S S 3"]:
    height, width = frames.shape[1:3]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(frames, [(0, 0), (top, side - height - top), (left, side - width - left), (0, 0)])
