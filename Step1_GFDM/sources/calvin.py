"""Annotated spans of demonstrations in CALVIN's format: one recording each."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from defi.calvin import CalvinFolder, Span
from defi.errors import UserError
from Step1_GFDM.sources.recordings import CaptionedSource, Recording, Recordings, Scene

FPS = 30
CAMERAS = ["static", "gripper"]


@dataclass
class Source(CaptionedSource):
    """splits: folders below root."""

    def open(self, split: str) -> Recordings:
        data = CalvinFolder(Path(self.root, self.theirs(split)))
        spans = [Recording(f"{n:06d}", partial(self._read, data, span)) for n, span in enumerate(data.spans)]
        return Recordings(spans, CAMERAS, data.fingerprint)

    def _read(self, data: CalvinFolder, span: Span) -> Scene:
        if span.fault:
            raise UserError(span.fault)
        frames = range(span.start, span.end + 1, self.every)
        views = {camera: data.stack(f"rgb_{camera}", frames) for camera in CAMERAS}
        return Scene(views, [span.instruction], FPS / self.every)
