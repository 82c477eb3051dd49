"""Demonstrations in CALVIN's format. Their actions are not read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from defi.data.calvin import TRAINING, VALIDATION, CalvinFolder
from defi.errors import UserError
from defi.processes import print_once
from Step2_GIDM.data.pairs import Clip, PairsSettings, Part, Source

CAMERAS = ("static", "gripper")


@dataclass(kw_only=True)
class Settings(PairsSettings):
    """`held_out` and `split` are folders of `root`.

    language: only annotated spans, with their text; None: in training, but not where all clips are wanted.
    """

    held_out: str
    split: str
    cameras: list[str]
    language: bool | None

    def open(self, part: Part) -> "CalvinClips":
        split = self.held_out if part == "held_out" else self.split
        language = part != "all" if self.language is None else self.language
        return CalvinClips(Path(self.root) / split, cameras=self.cameras, language=language)


class CalvinClips(Source):
    """One clip per annotated span with its instruction (`language`), or per recording, and per camera."""

    def __init__(self, folder: Path, *, cameras: Sequence[str], language: bool) -> None:
        if unknown := set(cameras).difference(CAMERAS):
            raise UserError(f"data.cameras: {min(unknown)!r} is no camera; choose from {', '.join(CAMERAS)}")
        self.data = CalvinFolder(folder)
        self.fingerprint = self.data.fingerprint
        bounds = [(start, end, "") for start, end in self.data.episodes]
        if language:
            bounds = [(span.start, span.end, span.instruction) for span in self.data.spans if not span.fault]
            print_once(self.data.missing_text_note(fate="left out"))
        self.clips = [
            Clip(camera, start, end - start + 1, (text,)) for camera in cameras for start, end, text in bounds
        ]
        what = "annotated spans" if language else "all recordings, without instructions"
        self.scope = f"{folder} ({', '.join(cameras)}; {what})"
        self.left_out = [f"the camera {name} (data.cameras)" for name in CAMERAS if name not in cameras]
        self.left_out += ["frames without annotation (data.language)"] if language else []
        others = [s for s in (TRAINING, VALIDATION) if s != folder.name and (folder.parent / s).is_dir()]
        self.left_out += [f"the split {split} (data.split)" for split in others]

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        return self.data.stack(f"rgb_{clip.name}", [clip.start + position for position in positions])
