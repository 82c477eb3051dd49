"""The `data` section of a configuration → data set of pairs."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from defi.config import CONFIG_DIR, typed
from defi.errors import UserError
from Step2_GIDM.data.mixture import PairMixture
from Step2_GIDM.data.pairs import PairDataset, PairsSettings, Part
from Step2_GIDM.data.sources import SOURCES

Section = Mapping[str, Any]


def build_pairs(
    data: Section, image_size: int, part: Part = "training", *, augment: bool = True
) -> PairDataset | PairMixture:
    """Pairs of the section's training clips, augmented as it says, or of those that are held out, as they are."""

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
    settings = read_mixture(data)
    sets = {name: pairs_of(own) for name, own in settings.items()}
    sizes = {n: own.size(sets[n]) if part == "training" else len(sets[n]) for n, own in settings.items()}
    return PairMixture(sets, {name: own.weight for name, own in settings.items()}, sizes)


def read_section(data: Section, where: str = "data") -> PairsSettings:
    """The section of one data set.

    Raises:
        UserError: no such source, a setting that it does not have, or a value of another type.
    """
    _refuse_unknown(data, _settings_of(data["source"], where), where)
    return typed(SOURCES[data["source"]], {key: data[key] for key in data.keys() - {"source"}}, where)


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
        root = Path(data["root"])
        chosen = {
            name: {"root": str(root / name), "weight": weight, **data["sets"][name]}
            for name, weight in weights.items()
        }
    if not chosen:
        raise UserError("data.sets: names no data set; give at least one, each with source, root and weight")
    common = {key: value for key, value in data.items() if key not in ("sets", "mixture", "mixtures", "root")}
    _refuse_unknown(common, set().union(*(_settings_of(source, "data") for source in SOURCES)), "data")
    return {name: _read_set(own, common, f"data.sets.{name}") for name, own in chosen.items()}


def _read_set(own: Section, common: Section, where: str) -> PairsSettings:
    if missing := [key for key in ("source", "root", "weight") if key not in {**common, **own}]:
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    source = {**common, **own}["source"]
    shared = {key: common[key] for key in common.keys() & _settings_of(source, where)}
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "data" / f"pairs_{source}.yaml"))
    return read_section({**defaults, **shared, **own}, where)


def _settings_of(source: str, where: str) -> set[str]:
    """Names of the settings that a source has."""
    if source not in SOURCES:
        raise UserError(f"{where}.source={source}: choose from {', '.join(SOURCES)}")
    return {"source", *(field.name for field in fields(SOURCES[source]))}


def _refuse_unknown(section: Section, known: set[str], where: str) -> None:
    """A setting that nothing reads."""
    for name, value in section.items():
        if name not in known:
            there = ", ".join(sorted(known))
            raise UserError(f"{where}.{name}={value}: no such setting; there are {there}")
