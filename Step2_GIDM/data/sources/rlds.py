"""RLDS data sets (Open X-Embodiment). Their actions are not read."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.data.rlds import RLDSDataset, default_splits
from defi.data.rlds.spec import find_version, read_splits
from Step2_GIDM.data.pairs import FARTHEST, Clip, PairDataset, PairsSettings, Part, Source


@dataclass(kw_only=True)
class Settings(PairsSettings):
    """See configs/data/pairs_rlds.yaml. trim: steps left out at the start and the end of every episode."""

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

    def open(self, part: Part) -> "RLDSClips":
        split = self.held_out if part == "held_out" else self.split
        if not split:
            training, held_out = default_splits(self.root)
            if part == "held_out" and held_out == "train":
                what = "too few episodes to hold any out; pictures and health are of the training's"
                warnings.warn(f"{self.root}: {what} (data.held_out)", stacklevel=2)
            split = held_out if part == "held_out" else training
            split = split.partition("[")[0] if part == "all" else split
        return RLDSClips(self, split)

    def data(self, split: str) -> RLDSDataset:
        return RLDSDataset(self.root, split, index=self.index)

    def size(self, pairs: PairDataset) -> int:
        """All steps of all splits but the trimmed ones, as the published code counts them."""
        steps = 0
        for split in read_splits(find_version(Path(self.root))):
            try:
                steps += int((self.data(split).lengths - sum(self.trim)).clip(0).sum())
            except UserError as error:  # the split that it trains on was opened before
                warnings.warn(f"share without the split {split}: {error}", stacklevel=2)
        return steps // self.stride


class RLDSClips(Source):
    """One clip per episode, named `data set:number in its split`. dropped: episodes left out, without a text.

    Raises:
        UserError: no episode has an instruction, and those without are left out.
    """

    def __init__(self, settings: Settings, split: str) -> None:
        self.data = data = settings.data(split)
        self.fingerprint, self.picture = data.fingerprint, data.picture(settings.image)
        self.language, self.trim = data.language(settings.language), settings.trim
        kept = np.ones(len(data), bool)
        if settings.drop_unlabelled:
            kept = data.labelled(self.language, self.trim)
        self.episodes, self.dropped, name = kept.nonzero()[0], int((~kept).sum()), data.split.name
        self.lengths = (data.lengths[self.episodes] - sum(self.trim)).clip(0)
        what = f"{data.folder}: of {len(data):,} episodes of {name}"
        if self.dropped == len(data):
            raise UserError(f"{what} none has an instruction; data.drop_unlabelled=false keeps them")
        if self.dropped:
            why = "they have no instruction (data.drop_unlabelled)"
            warnings.warn(f"{what} {self.dropped:,} are left out: {why}", stacklevel=2)
        self.scope, others = f"{data.folder} ({split})", data.split.episodes - len(data)
        unused = read_splits(data.folder).keys() - {name}
        self.left_out = [f"the split {other} (data.split)" for other in sorted(unused)]
        for number, text in (
            (others, f"{others:,} episodes of {name} (data.split)"),
            (self.dropped, f"{self.dropped:,} episodes without an instruction (data.drop_unlabelled)"),
            (sum(self.trim), f"{self.trim[0]} and {self.trim[1]} steps at their ends (data.trim)"),
        ):
            self.left_out += [text] if number else []

    def clip(self, number: int) -> Clip:
        episode, first, length = int(self.episodes[number]), self.trim[0], int(self.lengths[number])
        texts = self.data.texts(episode, self.language, slice(first, first + length))
        return Clip(f"{self.data.name}:{self.data.first + episode}", first, length, texts)

    def episode(self, clip: Clip) -> int:
        """Which episode of the split a clip is."""
        return int(clip.name.rpartition(":")[2]) - self.data.first

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        steps = [clip.start + position for position in positions]
        return self.data.frames(self.episode(clip), steps, self.picture)
