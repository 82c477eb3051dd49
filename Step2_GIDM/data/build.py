"""The `data` section of a configuration → data set of pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from defi.config import CONFIG_DIR
from defi.errors import UserError
from defi.rlds import RLDSDataset, default_splits
from Step2_GIDM.data.augment import Augmentation
from Step2_GIDM.data.calvin import CalvinClips
from Step2_GIDM.data.mixture import PairMixture
from Step2_GIDM.data.pairs import PairDataset, Source
from Step2_GIDM.data.rlds import RLDSClips
from Step2_GIDM.data.videos import VideoClips

SOURCES = ("calvin", "videos", "rlds")


def build_source(data: Mapping[str, Any], *, held_out: bool = False) -> Source:
    """The clips of one data set that the section names: those for training, or those held out."""
    root = Path(data["root"])
    if data["source"] == "calvin":
        folder = root / (data["held_out"] if held_out else data["split"])
        return CalvinClips(folder, cameras=data["cameras"], language=data["language"])
    if data["source"] == "videos":
        return VideoClips(Path(data["held_out"]) if held_out and data["held_out"] else root)
    if data["source"] == "rlds":
        split = data["held_out"] if held_out else data["split"]
        chosen = RLDSDataset(root, split or default_splits(root)[held_out], index=data["index"])
        return RLDSClips(chosen, image=data["image"], language=data["language"])
    raise UserError(f"data.source={data['source']}: choose from {', '.join(SOURCES)}")


def sections(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The data sets of a mixture, by name, each a whole section with a `weight`.

    A mixture names its sets itself, or (`mixture`) takes those of a table. What a set leaves out it takes
    from the mixture, then from configs/data/pairs_<source>.yaml.
    """
    chosen = data["sets"]
    if "mixture" in data:
        weights = data["mixtures"].get(data["mixture"])
        if weights is None:
            raise UserError(f"data.mixture={data['mixture']}: choose from {', '.join(data['mixtures'])}")
        root = Path(data["root"])
        chosen = {
            name: {"root": root / name, "weight": w, **data["sets"][name]} for name, w in weights.items()
        }
    if not chosen:
        raise UserError("data.sets: names no data set; give at least one, each with source, root and weight")
    common = {key: value for key, value in data.items() if key not in ("sets", "mixture", "mixtures", "root")}
    return {name: _complete(name, {**common, **section}) for name, section in chosen.items()}


def _complete(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    missing = [key for key in ("source", "root", "weight") if key not in section]
    if missing:
        raise UserError(f"data.sets.{name}: says nothing of {', '.join(missing)}")
    file = CONFIG_DIR / "data" / f"pairs_{section['source']}.yaml"
    if section["source"] not in SOURCES:
        raise UserError(f"data.sets.{name}.source={section['source']}: choose from {', '.join(SOURCES)}")
    return {**OmegaConf.to_container(OmegaConf.load(file)), **section}


def training_pairs(
    data: Mapping[str, Any], image_size: int, *, augment: bool = True
) -> PairDataset | PairMixture:
    """Pairs of the section's training clips, augmented as it says."""
    augmentation = Augmentation(**data["augmentation"]) if augment and data["augmentation"] else None
    return _pairs(data, image_size, augmentation)


def held_out_pairs(data: Mapping[str, Any], image_size: int) -> PairDataset | PairMixture:
    """Pairs of the section's held-out clips, as they are."""
    return _pairs(data, image_size, None, held_out=True)


def _pairs(
    data: Mapping[str, Any], image_size: int, augmentation: Augmentation | None, *, held_out: bool = False
) -> PairDataset | PairMixture:
    if "sets" in data:
        parts = sections(data)
        pairs = {
            name: _pairs(part, image_size, augmentation, held_out=held_out) for name, part in parts.items()
        }
        return PairMixture(pairs, {name: part["weight"] for name, part in parts.items()})
    low, high = data["distance"]
    return PairDataset(
        build_source(data, held_out=held_out),
        image_size=image_size,
        distance=(low, high),
        stride=data["stride"],
        augmentation=augmentation,
    )
