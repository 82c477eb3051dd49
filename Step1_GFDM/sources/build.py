"""The settings of a source → a source per split."""

from pathlib import Path

from defi.errors import UserError
from defi.rlds import RLDSDataset, default_splits
from Step1_GFDM.sources.calvin import CalvinSpans
from Step1_GFDM.sources.hdf5 import HDF5Episodes
from Step1_GFDM.sources.recordings import Source
from Step1_GFDM.sources.rlds import RLDSEpisodes
from Step1_GFDM.sources.settings import HDF5Settings, RLDSSettings, SourceSettings, VideosSettings
from Step1_GFDM.sources.videos import CaptionedVideos
from Step1_GFDM.sources.vpp import AnnotatedVideos


def build_source(data: SourceSettings, split: str) -> Source:
    """Recordings of our split `train` or `val`. Raises UserError for what is missing."""
    root = Path(data.root)
    if isinstance(data, RLDSSettings):
        theirs = data.splits.get(split) or default_splits(root)[split == "val"]
        chosen = RLDSDataset(root, theirs, index=data.index)
        cameras = data.cameras or {"static": None}
        return RLDSEpisodes(chosen, cameras=cameras, language=data.language, fps=data.fps)
    if isinstance(data, (VideosSettings, HDF5Settings)):
        # Files that know no splits: where `val` names none, a part of `train` is held out.
        held_out = (split == "val") if data.splits.get("val") is None else None
        place = root / _theirs(data, split if held_out is None else "train")
        if isinstance(data, VideosSettings):
            return CaptionedVideos(place, root / data.videos, held_out=held_out, longest=data.longest)
        keys = ("cameras", "text", "instruction", "fps", "groups", "crop", "pad")
        return HDF5Episodes(place, held_out=held_out, **{key: getattr(data, key) for key in keys})
    theirs = _theirs(data, split)
    return AnnotatedVideos(root, theirs) if data.source == "vpp" else CalvinSpans(root / theirs)


def _theirs(data: SourceSettings, split: str) -> str:
    """What the source calls our split. Raises UserError if the settings do not say."""
    if not (name := data.splits.get(split)):
        raise UserError(f"data.splits.{split}={name}: give what data.source={data.source} calls it")
    return name
