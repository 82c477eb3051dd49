"""The `data` section of a configuration → data set of pairs."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from defi.config import CONFIG_DIR, typed
from defi.errors import UserError
from Step2_GIDM.data.pairs import PairDataset, PairMixture, PairsSettings, Part
from Step2_GIDM.data.sources import SOURCES

Section = Mapping[str, Any]
HEAVIEST = 10**6  # weight: places of an epoch are counted in 64 bits


def build_pairs(
    data: Section, image_size: int, part: Part = "training", *, augment: bool = True
) -> PairDataset | PairMixture:
    """Pairs of the section's training clips, augmented as it says, or of those held out, as they are."""

    def pairs_of(settings: PairsSettings) -> PairDataset:
        return PairDataset(
            settings.open(part),
            image_size=image_size,
            distance=settings.distance,
            stride=settings.stride,
            augmentation=settings.augmentation if augment and part == "training" else None,
        )

    if "sets" not in data:
        return pairs_of(read_section(data))
    sets, places = {}, {}
    for name, settings in read_mixture(data).items():
        if not 0 < (weight := settings.weight) <= HEAVIEST:
            raise UserError(f"data.sets.{name}.weight={weight}: must be above 0 and at most {HEAVIEST:,}")
        sets[name] = pairs = pairs_of(settings)
        places[name] = max(1, round(weight * (settings.size(pairs) if part == "training" else len(pairs))))
    return PairMixture(sets, places)


def read_section(data: Section, where: str = "data") -> PairsSettings:
    """The section of one data set.

    Raises:
        UserError: no such source, a setting that it does not have, or a value of another type.
    """
    if (source := data["source"]) not in SOURCES:
        raise UserError(f"{where}.source={source}: choose from {', '.join(SOURCES)}")
    return typed(SOURCES[source], {key: data[key] for key in data.keys() - {"source"}}, where)


def read_mixture(data: Section) -> dict[str, PairsSettings]:
    """The data sets of a mixture, by name.

    A mixture names its sets itself, or (`mixture`) takes those of a table. What a set leaves out it takes
    from the mixture, then from configs/data/pairs_<source>.yaml.

    Raises:
        UserError: there is no set, one says too little, or a setting that none has.
    """
    chosen = data["sets"]
    if "mixture" in data:
        weights = data["mixtures"].get(data["mixture"])
        if weights is None:
            raise UserError(f"data.mixture={data['mixture']}: choose from {', '.join(data['mixtures'])}")
        chosen = {
            name: {"root": str(Path(data["root"], name)), "weight": weight, **data["sets"][name]}
            for name, weight in weights.items()
        }
    if not chosen:
        raise UserError("data.sets: names no data set; give at least one, each with source, root and weight")
    known = {kind: {"source", *(each.name for each in fields(SOURCES[kind]))} for kind in SOURCES}
    common = {key: value for key, value in data.items() if key not in ("sets", "mixture", "mixtures", "root")}
    for name in common.keys() - set().union(*known.values()):
        raise UserError(f"data.{name}={common[name]}: no data set has such a setting; leave it out")
    found = {}
    for name, own in chosen.items():
        given, where = {**common, **own}, f"data.sets.{name}"
        if missing := [key for key in ("source", "root", "weight") if key not in given]:
            raise UserError(f"{where}: lacks {', '.join(missing)}")
        if (source := given["source"]) in SOURCES:  # if not, `read_section` says so
            defaults = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "data" / f"pairs_{source}.yaml"))
            shared = {key: value for key, value in common.items() if key in known[source]}
            given = {**defaults, **shared, **own}
        found[name] = read_section(given, where)
    return found
