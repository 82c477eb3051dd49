"""Any folder of videos as a source of pairs: no labels, no text."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.film import Numbering, number_video
from defi.files import find_files
from defi.video import VIDEO_SUFFIXES, read_frames
from defi.video_index import number_videos
from Step2_GIDM.data.pairs import Clip


class VideoClips:
    """One clip per video file anywhere below `root` (or `root` itself, a file); damaged ones are left out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.exists():
            raise UserError(f"{root}: no such file or folder; give a folder of videos")
        if root.is_file():
            files, found = [root], [number_video(root)]
        else:
            files = find_files(root, VIDEO_SUFFIXES)
            found = number_videos(root, files)
        if not files:
            raise UserError(f"{root}: no videos here ({', '.join(VIDEO_SUFFIXES)}); give a folder of videos")
        self.damaged = [fault for fault in found if isinstance(fault, UserError)]
        self._numberings = {str(file): n for file, n in zip(files, found) if isinstance(n, Numbering)}
        self.clips = [Clip(file, 0, numbering.frames) for file, numbering in self._numberings.items()]
        self.lengths = np.array([clip.length for clip in self.clips], np.int64)
        if not self.clips:
            raise UserError(f"{root}: none of {len(files)} videos can be read; the first: {self.damaged[0]}")
        if self.damaged:
            warnings.warn(
                f"{len(self.damaged)} of {len(files)} videos left out; the first: {self.damaged[0]}",
                stacklevel=2,
            )

    @property
    def fingerprint(self) -> str:
        """Hash of names and frame counts."""
        lines = "".join(f"{Path(clip.name).name} {clip.length}\n" for clip in self.clips)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        return read_frames(Path(clip.name), positions, self._numberings[clip.name])
