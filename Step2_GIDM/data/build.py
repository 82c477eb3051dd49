"""The `data` section of a configuration → data set of pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defi.errors import UserError
from Step2_GIDM.data.augment import Augmentation
from Step2_GIDM.data.calvin import CalvinClips
from Step2_GIDM.data.pairs import PairDataset, Source
from Step2_GIDM.data.videos import VideoClips


def build_source(data: Mapping[str, Any], *, held_out: bool = False) -> Source:
    """The clips the section names: those for training, or those held out."""
    root = Path(data["root"])
    if data["source"] == "calvin":
        folder = root / (data["held_out"] if held_out else data["split"])
        return CalvinClips(folder, cameras=data["cameras"], language=data["language"])
    if data["source"] == "videos":
        return VideoClips(Path(data["held_out"]) if held_out and data["held_out"] else root)
    raise UserError(f"data.source={data['source']}: choose calvin or videos")


def training_pairs(data: Mapping[str, Any], image_size: int, *, augment: bool = True) -> PairDataset:
    """Pairs of the section's training clips, augmented as it says."""
    augmentation = Augmentation(**data["augmentation"]) if augment and data["augmentation"] else None
    return _pairs(build_source(data), data, image_size, augmentation)


def held_out_pairs(data: Mapping[str, Any], image_size: int) -> PairDataset:
    """Pairs of the section's held-out clips, as they are."""
    return _pairs(build_source(data, held_out=True), data, image_size, None)


def _pairs(
    source: Source, data: Mapping[str, Any], image_size: int, augmentation: Augmentation | None
) -> PairDataset:
    low, high = data["distance"]
    return PairDataset(
        source,
        image_size=image_size,
        distance=(low, high),
        stride=data["stride"],
        augmentation=augmentation,
    )
