"""Annotated spans of demonstrations in CALVIN's format."""

from pathlib import Path

from defi.calvin import CalvinFolder, Span
from defi.errors import UserError
from Step1_GFDM.sources.recordings import Recording, Scene

FPS = 30
CAMERAS = ["static", "gripper"]


class CalvinSpans:
    """One recording per annotated span."""

    cameras = CAMERAS

    def __init__(self, folder: Path) -> None:
        self.data = CalvinFolder(folder)
        self.recordings = [Recording(f"{number:06d}", span) for number, span in enumerate(self.data.spans)]

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def read(self, recording: Recording, every: int) -> Scene:
        span: Span = recording.place
        if span.fault:
            raise UserError(span.fault)
        frames = range(span.start, span.end + 1, every)
        views = {camera: self.data.stack(f"rgb_{camera}", frames) for camera in CAMERAS}
        return Scene(views, [span.instruction], FPS / every)
