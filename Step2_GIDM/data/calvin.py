"""Demonstrations in CALVIN's format as a source of pairs. Their actions are not read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from defi.calvin import CalvinFolder
from defi.errors import UserError
from defi.processes import print_once
from Step2_GIDM.data.pairs import Clip

CAMERAS = ("static", "gripper")


class CalvinClips:
    """One clip per annotated span with its instruction (`language`), or per recording, and per camera."""

    def __init__(self, folder: Path, *, cameras: Sequence[str], language: bool) -> None:
        for camera in cameras:
            if camera not in CAMERAS:
                raise UserError(f"data.cameras: {camera!r} is no camera; choose from {', '.join(CAMERAS)}")
        self.data = CalvinFolder(folder)
        if language:
            bounds = [(span.start, span.end, span.instruction) for span in self.data.spans if not span.fault]
            print_once(self.data.missing_text_note(fate="left out"))
        else:
            bounds = [(start, end, "") for start, end in self.data.episodes]
        self.clips = [
            Clip(camera, start, end - start + 1, (text,)) for camera in cameras for start, end, text in bounds
        ]
        self.lengths = np.array([clip.length for clip in self.clips], np.int64)

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        return self.data.stack(f"rgb_{clip.name}", [clip.start + position for position in positions])
