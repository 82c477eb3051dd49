"""Data sets of all formats, as one: `open_dataset` gives their episodes to every stage.

episode.py   what a data set is: numbered frames, episodes of them, pictures of several cameras, instructions
mixture.py   several as one, with weights
motions.py   actions and state of all frames, read once and kept in an index; their statistics
calvin.py, hdf5/, lerobot/, rlds/, videos.py, vpp.py   one format each
convert.py   any of them → LeRobot, RLDS or CALVIN
look.py      what a data set holds, and what looks wrong with it

`data.format=calvin` is the module `calvin` here. To add a format takes two files: a module with a
`Settings(DataSettings)` that opens a `Dataset`, and its settings, configs/data/<module>.yaml.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

from omegaconf import OmegaConf

from defi.config import CONFIG_DIR, typed
from defi.data.episode import Dataset, DataSettings, Episode, Part
from defi.errors import UserError

__all__ = [
    "Dataset",
    "DataSettings",
    "Episode",
    "Part",
    "formats",
    "open_dataset",
    "read_sets",
    "read_settings",
]

OTHERS = {"convert", "episode", "look", "mixture", "motions"}  # modules here that are no formats
StageSettings = TypeVar("StageSettings")


def read_sets(
    data: Mapping[str, Any], stage: type[StageSettings]
) -> dict[str, tuple[DataSettings, StageSettings]]:
    """The data sets of a mixture, a section `data` with `sets`, by name.

    A mixture names its sets itself, or (`mixture`) takes those of a table. What a set leaves out it takes
    from the mixture, then from configs/data/<format>.yaml.

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
        raise UserError("data.sets: names no data set; give at least one, each with format, root and weight")
    common = {key: value for key, value in data.items() if key not in ("sets", "mixture", "mixtures", "root")}
    found, used = {}, {"format"}
    for name, own in chosen.items():
        given, where = {**common, **own}, f"data.sets.{name}"
        if missing := [key for key in ("format", "root", "weight") if key not in given]:
            raise UserError(f"{where}: lacks {', '.join(missing)} (it says {', '.join(own)})")
        if given["format"] in formats():  # if not, `read_settings` says so
            defaults = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "data" / f"{given['format']}.yaml"))
            known = defaults.keys() | {field.name for field in fields(stage)}
            used |= common.keys() & known
            given = {**defaults, **{key: value for key, value in common.items() if key in known}, **own}
        found[name] = read_settings(given, stage, where)
    for name in common.keys() - used:
        raise UserError(f"data.{name}={common[name]}: no data set has such a setting; leave it out")
    return found


@dataclass
class NoSettings:
    """Of a command that only opens a data set."""


def formats() -> list[str]:
    """Names of the formats."""
    return sorted(module.name for module in iter_modules(__path__) if module.name not in OTHERS)


def read_settings(
    section: Mapping[str, Any], stage: type[StageSettings], where: str = "data"
) -> tuple[DataSettings, StageSettings]:
    """A section `data`: the settings of its format, and a stage's own beside them.

    Raises:
        UserError: no such format, a setting that neither knows, or a value of another type.
    """
    if (name := section["format"]) not in formats():
        raise UserError(f"{where}.format={name}: choose from {', '.join(formats())}")
    if isinstance(cameras := section.get("cameras"), Mapping):
        raise UserError(f"{where}.cameras={cameras}: must be a list, [name] or [name:place in the data]")
    kind = import_module(f"{__name__}.{name}").Settings
    own = {field.name for field in fields(stage)}
    values = {key: value for key, value in section.items() if key != "format"}
    ours = {key: values.pop(key) for key in own & values.keys()}
    return typed(kind, values, where), typed(stage, ours, where)


def open_dataset(section: Mapping[str, Any], part: Part = "training", where: str = "data") -> Dataset:
    """One part of the data set that a section with nothing but a format's settings names."""
    return read_settings(section, NoSettings, where)[0].open(part)
