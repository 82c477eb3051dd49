"""Where pairs of frames come from: any folder of videos, or demonstrations in CALVIN's format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from defi.calvin import CalvinFolder
from defi.errors import UserError
from defi.video import VIDEO_SUFFIXES, frame_count, read_frames

CAMERAS = ("static", "gripper")


@dataclass(frozen=True)
class Clip:
    """Consecutive frames of one scene. `name` says where they come from, `text` what happens ("" if unknown)."""

    name: str
    start: int
    length: int
    text: str = ""


class Source(Protocol):
    """Clips, and the frames of a clip by their positions in it."""

    clips: Sequence[Clip]
    fingerprint: str

    def read(self, clip: int, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]: ...
