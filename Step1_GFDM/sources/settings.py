"""What the `data` section of configs/step1_prepare.yaml says, for each kind of source."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from defi.config import typed
from defi.errors import UserError
from Step1_GFDM.config import check_rate
from Step1_GFDM.data import stored_step


@dataclass
class SourceSettings:
    """splits: ours -> the source's. every: take every n-th frame. Clips are cut from what is taken:
    `Step1_GFDM.data` finds it in the manifest."""

    source: str
    root: str
    splits: dict[str, str | None]
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"data.every={self.every}: must be at least 1")

    def deciding(self) -> dict[str, Any]:
        """What decides how episodes look, for JSON. Where data lie does not: their fingerprint knows them."""
        return {key: value for key, value in asdict(self).items() if key not in ("root", "index")}


@dataclass
class FilesSettings(SourceSettings):
    """Of sources whose fingerprint knows files by their names only."""

    def deciding(self) -> dict[str, Any]:
        """With the root, however it is spelled: other files may have the same names."""
        return super().deciding() | {"root": str(Path(self.root).resolve())}


@dataclass
class VPPSettings(FilesSettings):
    """The videos may themselves lack frames of the recording: those of a folder that was prepared before."""

    def deciding(self) -> dict[str, Any]:
        return super().deciding() | {"every": self.every * stored_step(Path(self.root))}


@dataclass
class VideosSettings(FilesSettings):
    """videos: folder below root. longest: frames."""

    videos: str = "."
    longest: int | None = None


@dataclass
class RecordedSettings(SourceSettings):
    """Of sources that do not say how fast they were recorded. fps: frames per second."""

    fps: float = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("data.fps", self.fps)


@dataclass
class HDF5Settings(FilesSettings, RecordedSettings):
    """See `Step1_GFDM.sources.hdf5.HDF5Episodes`."""

    cameras: dict[str, str] = field(default_factory=dict)
    text: str = ""
    instruction: str | None = None
    groups: str | None = None
    crop: dict[str, list[int]] | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cameras:
            raise UserError("data.cameras={}: name at least one, {name: path of its pictures in an episode}")


@dataclass
class RLDSSettings(RecordedSettings):
    """See `Step1_GFDM.sources.rlds.RLDSEpisodes`. index: where the places of pictures are kept."""

    cameras: dict[str, str | None] | None = None
    language: str | None = None
    index: str = ""


SOURCES = {
    "calvin": SourceSettings,
    "videos": VideosSettings,
    "vpp": VPPSettings,
    "hdf5": HDF5Settings,
    "rlds": RLDSSettings,
}


def read_settings(data: Mapping[str, Any]) -> SourceSettings:
    """Of the `data` section. Raises UserError for a source that does not exist, or a value that cannot be."""
    if data["source"] not in SOURCES:
        raise UserError(f"data.source={data['source']}: choose from {', '.join(SOURCES)}")
    return typed(SOURCES[data["source"]], data, "data")
