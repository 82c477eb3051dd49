"""The `data` section of configs/step1_prepare.yaml → a source per split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defi.errors import UserError
from defi.rlds import RLDSDataset, default_splits
from Step1_GFDM.sources.calvin import CalvinSpans
from Step1_GFDM.sources.hdf5 import HDF5Episodes
from Step1_GFDM.sources.recordings import Source
from Step1_GFDM.sources.rlds import RLDSEpisodes
from Step1_GFDM.sources.videos import CaptionedVideos
from Step1_GFDM.sources.vpp import AnnotatedVideos

SOURCES = ("calvin", "videos", "vpp", "hdf5", "rlds")


def build_source(data: Mapping[str, Any], split: str) -> Source:
    """Recordings of our split `train` or `val`. Raises UserError for what is missing."""
    root, theirs = Path(data["root"]), data["splits"][split]
    if data["source"] == "calvin":
        return CalvinSpans(root / theirs)
    if data["source"] == "vpp":
        return AnnotatedVideos(root, theirs)
    if data["source"] == "rlds":
        chosen = RLDSDataset(root, theirs or default_splits(root)[split == "val"], index=data["index"])
        cameras = data["cameras"] or {"static": None}
        return RLDSEpisodes(chosen, cameras=cameras, language=data["language"], fps=data["fps"])
    # Files that know no splits: where `val` names none, a part of `train` is held out.
    held_out = (split == "val") if data["splits"]["val"] is None else None
    place = root / (theirs or data["splits"]["train"])
    if data["source"] == "videos":
        return CaptionedVideos(place, root / data["videos"], held_out=held_out, longest=data["longest"])
    if data["source"] == "hdf5":
        keys = ("cameras", "text", "instruction", "fps", "groups", "crop", "pad")
        return HDF5Episodes(place, held_out=held_out, **{key: data[key] for key in keys})
    raise UserError(f"data.source={data['source']}: choose from {', '.join(SOURCES)}")
