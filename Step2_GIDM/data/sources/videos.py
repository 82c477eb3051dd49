"""Any folder of videos: no labels, no text."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.files import find_files
from defi.video import VIDEO_SUFFIXES, number_video, read_frames
from defi.video_index import number_videos
from Step2_GIDM.data.pairs import Clip, PairsSettings, Part, Source


@dataclass(kw_only=True)
class Settings(PairsSettings):
    """`held_out` is a folder like `root`; None: `root` itself."""

    def open(self, part: Part) -> "VideoClips":
        return VideoClips(Path(self.held_out if part == "held_out" and self.held_out else self.root))


class VideoClips(Source):
    """One clip per video file anywhere below `root` (or `root` itself, a file); damaged ones are left out."""

    def __init__(self, root: Path) -> None:
        files = [root] if root.is_file() else find_files(root, VIDEO_SUFFIXES)
        if not files:
            kinds = ", ".join(VIDEO_SUFFIXES)
            what = f"no videos here ({kinds})" if root.exists() else "no such file or folder"
            raise UserError(f"{root}: {what}; give a folder of videos")
        found = [number_video(root)] if root.is_file() else number_videos(root, files)
        damaged = [fault for fault in found if isinstance(fault, UserError)]
        count = f"{len(damaged)} of {len(files)} videos"
        self._numberings = {str(f): n for f, n in zip(files, found) if not isinstance(n, UserError)}
        if not self._numberings:
            raise UserError(f"{root}: {count} cannot be read; the first: {damaged[0]}")
        if damaged:
            warnings.warn(f"{count} left out; the first: {damaged[0]}", stacklevel=2)
        self.clips = [Clip(file, 0, numbering.frames) for file, numbering in self._numberings.items()]
        self.scope = str(root)
        self.left_out = [f"videos that cannot be opened ({len(damaged):,})"] if damaged else []
        names = "".join(f"{Path(clip.name).name} {clip.length}\n" for clip in self.clips)
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()[:16]

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        return read_frames(Path(clip.name), positions, self._numberings[clip.name])
