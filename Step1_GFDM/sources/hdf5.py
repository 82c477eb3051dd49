"""Teleoperation episodes in HDF5 files (ALOHA's, robomimic's and the like): pictures per camera, raw or JPEG.

A camera's pictures are a data set of the file (or of a group, where a file holds several episodes):
uint8 [F, H, W, 3]; or one encoded picture per row, padded with zeros ([F, bytes]) or of varying length.
Needs the package h5py.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.files import find_files
from defi.hdf5 import read_hdf5
from defi.picture import decode_picture, stack_frames
from Step1_GFDM.config import check_rate
from Step1_GFDM.sources.recordings import CaptionedSource, Recording, Recordings, Scene, file_name, part

SUFFIXES = (".hdf5", ".h5")
Frames = UInt8[np.ndarray, "F H W 3"]


@dataclass
class Source(CaptionedSource):
    """One recording per file, or per group of each file. splits: folders below root; where `val` is None,
    every 20th recording is held out.

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
        check_rate("data.fps", self.fps)
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
        files = find_files(folder, SUFFIXES)
        if not files:
            raise UserError(f"{folder}: no HDF5 files here ({', '.join(SUFFIXES)}); check data.root")
        found = []
        for file in files:
            parts = file.relative_to(folder).with_suffix("").parts
            for group in self._groups(file):
                name = file_name("-".join([*parts, *group]))
                found.append(Recording(name, partial(self._read, file, "/".join(group))))
        return Recordings.of_files(part(found, held_out), list(self.cameras))

    def _groups(self, file: Path) -> list[list[str]]:
        """Places of a file's episodes; of a damaged file the place where they would be."""
        if self.groups is None:
            return [[]]
        try:
            members = read_hdf5(file, group=self.groups, cameras={}, text="", every=1).members
        except UserError:
            return [[self.groups]]
        return [[self.groups, name] for name in members]

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
        """Decoded, cut out and padded. Raises UserError for damage, and a crop that leaves the pictures."""
        if isinstance(pictures, list):
            places = [f"{path}: picture {number} of {camera}" for number in range(len(pictures))]
            pictures = stack_frames([decode_picture(*each) for each in zip(pictures, places)], places)
        if box := (self.crop or {}).get(camera):
            top, left, height, width = box
            if top + height > pictures.shape[1] or left + width > pictures.shape[2]:
                size = f"{pictures.shape[1]} x {pictures.shape[2]} pixels (height x width)"
                where = f"{path}: data.crop.{camera}={box} leaves its pictures of {size}"
                raise UserError(f"{where}; give [top, left, height, width] within them")
            pictures = pictures[:, top : top + height, left : left + width]
        if self.pad:
            missing = [max(pictures.shape[1:3]) - side for side in pictures.shape[1:3]]
            borders = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
            pictures = np.pad(pictures, [(0, 0), *borders, (0, 0)])
        return pictures
