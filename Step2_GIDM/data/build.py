"""The `data` section of a configuration → data set of pairs."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from defi.calvin import TRAINING, VALIDATION
from defi.config import CONFIG_DIR, typed
from defi.errors import UserError
from defi.rlds import FEW, RLDSDataset, default_splits
from defi.rlds.spec import find_version, read_splits
from Step2_GIDM.data.augment import Augmentation
from Step2_GIDM.data.calvin import CAMERAS, CalvinClips
from Step2_GIDM.data.mixture import PairMixture
from Step2_GIDM.data.pairs import PairDataset, Source
from Step2_GIDM.data.rlds import RLDSClips
from Step2_GIDM.data.videos import VideoClips

FARTHEST = 10**6  # frames between the two of a pair: hours of video


@dataclass(kw_only=True)
class PairsConfig:
    """What every data set's section says; the defaults are those of configs/data/pairs_<source>.yaml.

    weight: in a mixture. distance: [low, high], frames between the two of a pair. stride: frames between the
    starts of pairs. held_out: the part for pictures and health.
    """

    root: str
    held_out: str | None
    weight: float = 1.0
    distance: list[int]
    stride: int
    augmentation: Augmentation | None

    def __post_init__(self) -> None:
        if len(self.distance) != 2 or not 1 <= self.distance[0] <= self.distance[1] <= FARTHEST:
            limits = f"with 1 <= low <= high <= {FARTHEST:,}"
            raise UserError(f"data.distance={self.distance}: must be [low, high] {limits}")

    def size(self, pairs: PairDataset) -> int:
        """What a share in a mixture counts."""
        return len(pairs)


@dataclass(frozen=True)
class Whole:
    """All clips of a data set, but for those that its section leaves out.

    scope: what that is, in words. left_out: what else the data set holds.
    """

    source: Source
    scope: str
    left_out: list[str]


@dataclass(kw_only=True)
class CalvinPairs(PairsConfig):
    """`held_out` and `split` are folders of `root`.

    language: only annotated spans, with their text; None: in training, but not where all is wanted.
    """

    held_out: str
    split: str
    cameras: list[str]
    language: bool | None

    def open(self, held_out: bool) -> CalvinClips:
        split = self.held_out if held_out else self.split
        return self._clips(split, language=self.language is not False)

    def whole(self) -> Whole:
        source = self._clips(self.split, language=bool(self.language))
        other = [camera for camera in CAMERAS if camera not in self.cameras]
        left_out = [f"the camera {camera} (data.cameras)" for camera in other]
        left_out += ["frames without annotation (data.language)"] if self.language else []
        others = [s for s in (TRAINING, VALIDATION) if s != self.split and (Path(self.root) / s).is_dir()]
        left_out += [f"the split {name} (data.split)" for name in others]
        said = "annotated spans" if self.language else "all recordings, without instructions"
        return Whole(source, f"{source.data.folder} ({', '.join(self.cameras)}; {said})", left_out)

    def _clips(self, split: str, *, language: bool) -> CalvinClips:
        return CalvinClips(Path(self.root) / split, cameras=self.cameras, language=language)


@dataclass(kw_only=True)
class VideoPairs(PairsConfig):
    """`held_out` is a folder like `root`; None: `root` itself."""

    def open(self, held_out: bool) -> VideoClips:
        return VideoClips(Path(self.held_out if held_out and self.held_out else self.root))

    def whole(self) -> Whole:
        source = self.open(False)
        damaged = [f"videos that cannot be opened ({len(source.damaged):,})"] if source.damaged else []
        return Whole(source, self.root, damaged)


@dataclass(kw_only=True)
class RLDSPairs(PairsConfig):
    """`held_out` and `split` as TFDS names them. image, language: keys, searched for where None.

    trim, drop_unlabelled: as `RLDSClips` has them.
    """

    split: str | None
    image: str | None
    language: str | None
    trim: list[int]
    drop_unlabelled: bool
    index: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.trim) != 2 or not all(0 <= steps <= FARTHEST for steps in self.trim):
            raise UserError(f"data.trim={self.trim}: must be [steps at the start, steps at the end]")

    def open(self, held_out: bool) -> RLDSClips:
        return self._clips((self.held_out if held_out else self.split) or self._default(held_out))

    def _default(self, held_out: bool) -> str:
        """As the published code splits: where 95 % of the episodes are all of them, it trains on all."""
        splits = default_splits(self.root)
        if splits != FEW:
            return splits[held_out]
        if held_out:
            said = "too few episodes to hold any out; pictures and health are of those that are trained on"
            warnings.warn(f"{self.root}: {said} (data.held_out)", stacklevel=2)
        return "train"

    def size(self, pairs: PairDataset) -> int:
        """All steps of all splits but the trimmed ones, as the published code counts them."""
        steps = 0
        for split in read_splits(find_version(Path(self.root))):
            try:
                lengths = self._data(split).lengths
            except UserError as error:  # the split that it trains on was opened before
                warnings.warn(f"share without the split {split}: {error}", stacklevel=2)
                continue
            steps += int((lengths - sum(self.trim)).clip(0).sum())
        return steps // self.stride

    def whole(self) -> Whole:
        split = self.split or default_splits(self.root)[0].partition("[")[0]
        source = self._clips(split)
        there = read_splits(source.data.folder)
        left_out = [f"the split {name} (data.split)" for name in there if name != source.data.split.name]
        if more := source.data.split.episodes - len(source.data):
            left_out.append(f"{more:,} episodes of {source.data.split.name} (data.split)")
        if source.dropped:
            left_out.append(f"{source.dropped:,} episodes without an instruction (data.drop_unlabelled)")
        if any(self.trim):
            left_out.append(f"{self.trim[0]} and {self.trim[1]} steps at their ends (data.trim)")
        return Whole(source, f"{source.data.folder} ({split})", left_out)

    def _data(self, split: str) -> RLDSDataset:
        return RLDSDataset(self.root, split, index=self.index)

    def _clips(self, split: str) -> RLDSClips:
        return RLDSClips(
            self._data(split),
            image=self.image,
            language=self.language,
            trim=self.trim,
            drop_unlabelled=self.drop_unlabelled,
        )


SOURCES = {"calvin": CalvinPairs, "videos": VideoPairs, "rlds": RLDSPairs}


AnyPairs = CalvinPairs | VideoPairs | RLDSPairs


def source_kind(data: Mapping[str, Any], where: str) -> type[AnyPairs]:
    """The settings that the section's source has. Raises UserError if there is no such source."""
    if data["source"] not in SOURCES:
        raise UserError(f"{where}.source={data['source']}: choose from {', '.join(SOURCES)}")
    return SOURCES[data["source"]]


def names_of(*kinds: type[AnyPairs]) -> set[str]:
    """Names of the settings that sources have."""
    return {"source"}.union(*({field.name for field in fields(kind)} for kind in kinds))


def refuse_unknown(section: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raises UserError for a setting that is none of the `known`: it would have no effect."""
    if unknown := [f"{where}.{name}={value}" for name, value in section.items() if name not in known]:
        raise UserError(f"{unknown[0]}: no such setting; there are {', '.join(sorted(known))}")


def read_section(data: Mapping[str, Any], where: str = "data") -> AnyPairs:
    """The section of one data set.

    Raises:
        UserError: no such source, a setting that it does not have, or a value of another type.
    """
    kind = source_kind(data, where)
    refuse_unknown(data, names_of(kind), where)
    return typed(kind, {name: data[name] for name in data.keys() - {"source"}}, where)


def sections(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The data sets of a mixture, by name, each a whole section with a `weight`.

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
            name: {"root": root / name, "weight": w, **data["sets"][name]} for name, w in weights.items()
        }
    if not chosen:
        raise UserError("data.sets: names no data set; give at least one, each with source, root and weight")
    common = {key: value for key, value in data.items() if key not in ("sets", "mixture", "mixtures", "root")}
    refuse_unknown(common, names_of(*SOURCES.values()), "data")
    return {name: _complete(name, section, common) for name, section in chosen.items()}


def _complete(name: str, own: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """A set's whole section; of the common settings it takes those that its source has."""
    section = {**common, **own}
    missing = [key for key in ("source", "root", "weight") if key not in section]
    if missing:
        raise UserError(f"data.sets.{name}: says nothing of {', '.join(missing)}")
    known = names_of(source_kind(section, f"data.sets.{name}"))
    file = CONFIG_DIR / "data" / f"pairs_{section['source']}.yaml"
    shared = {key: value for key, value in common.items() if key in known}
    return {**OmegaConf.to_container(OmegaConf.load(file)), **shared, **own}


def training_pairs(
    data: Mapping[str, Any], image_size: int, *, augment: bool = True
) -> PairDataset | PairMixture:
    """Pairs of the section's training clips, augmented as it says."""
    return _pairs(data, image_size, augment=augment)


def held_out_pairs(data: Mapping[str, Any], image_size: int) -> PairDataset | PairMixture:
    """Pairs of the section's held-out clips, as they are."""
    return _pairs(data, image_size, augment=False, held_out=True)


def _pairs(
    data: Mapping[str, Any], image_size: int, *, augment: bool, held_out: bool = False
) -> PairDataset | PairMixture:
    def cut(config: PairsConfig) -> PairDataset:
        return PairDataset(
            config.open(held_out),
            image_size=image_size,
            distance=(config.distance[0], config.distance[1]),
            stride=config.stride,
            augmentation=config.augmentation if augment else None,
        )

    if "sets" not in data:
        return cut(read_section(data))
    parts = {name: read_section(part, f"data.sets.{name}") for name, part in sections(data).items()}
    sets = {name: cut(part) for name, part in parts.items()}
    sizes = {name: len(sets[name]) if held_out else part.size(sets[name]) for name, part in parts.items()}
    return PairMixture(sets, {name: part.weight for name, part in parts.items()}, sizes)
