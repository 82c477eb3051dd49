"""RLDS data sets (Open X-Embodiment). Their actions are not read."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.rlds import FEW, RLDSDataset, default_splits
from defi.rlds.spec import find_version, read_splits
from Step2_GIDM.data.pairs import FARTHEST, AllClips, Clip, PairDataset, PairsSettings, Source


@dataclass(kw_only=True)
class Settings(PairsSettings):
    """`held_out` and `split` as TFDS names them; None: `default_splits`.

    image: picture, a key under `steps/observation`; None: the only one.
    language: instruction, a path under `steps`; None: where data sets usually keep it, "" if nowhere.
    trim: how many steps are left out at the start and at the end of every episode.
    drop_unlabelled: leave out episodes without an instruction at any step that is left.
    index: folder that keeps the places of pictures.
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

    def open(self, held_out: bool) -> "RLDSClips":
        return RLDSClips(self, (self.held_out if held_out else self.split) or self._default(held_out))

    def _default(self, held_out: bool) -> str:
        """As the published code splits: where 95 % of the episodes are all of them, it trains on all."""
        splits = default_splits(self.root)
        if splits != FEW:
            return splits[held_out]
        if held_out:
            what = "too few episodes to hold any out; pictures and health are of those that are trained on"
            warnings.warn(f"{self.root}: {what} (data.held_out)", stacklevel=2)
        return "train"

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

    def open_all(self) -> AllClips:
        source = RLDSClips(self, self.split or default_splits(self.root)[0].partition("[")[0])
        data, name = source.data, source.data.split.name
        left_out = [f"the split {split} (data.split)" for split in read_splits(data.folder) if split != name]
        if more := data.split.episodes - len(data):
            left_out.append(f"{more:,} episodes of {name} (data.split)")
        if source.dropped:
            left_out.append(f"{source.dropped:,} episodes without an instruction (data.drop_unlabelled)")
        if any(self.trim):
            left_out.append(f"{self.trim[0]} and {self.trim[1]} steps at their ends (data.trim)")
        return AllClips(source, f"{data.folder} ({self.split or name})", left_out)


class RLDSClips(Source):
    """One clip per episode. dropped: how many episodes were left out.

    Raises:
        UserError: no episode has an instruction, and those without are left out.
    """

    def __init__(self, settings: Settings, split: str) -> None:
        self.data = data = settings.data(split)
        self.fingerprint, self.picture = data.fingerprint, data.picture(settings.image)
        self.clips = EpisodeClips(data, settings)
        self.lengths, self.dropped = self.clips.lengths, len(data) - len(self.clips)
        what = f"{data.folder}: of {len(data):,} episodes of {data.split.name}"
        if not len(self.clips):
            raise UserError(f"{what} none has an instruction; data.drop_unlabelled=false keeps them")
        if self.dropped:
            why = "they have no instruction (data.drop_unlabelled)"
            warnings.warn(f"{what} {self.dropped:,} are left out: {why}", stacklevel=2)

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        episode = int(clip.name.rpartition(":")[2]) - self.data.first
        return self.data.frames(episode, [clip.start + position for position in positions], self.picture)


class EpisodeClips(Sequence[Clip]):
    """Clips named `data set:number in its split`. Made when asked for: there are millions."""

    def __init__(self, data: RLDSDataset, settings: Settings) -> None:
        self.data, self.trim, self.language = data, settings.trim, data.language(settings.language)
        kept = data.labelled(self.language, self.trim) if settings.drop_unlabelled else np.ones(len(data), bool)
        self.episodes = kept.nonzero()[0]
        self.lengths = (data.lengths[self.episodes] - sum(self.trim)).clip(0)

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Clip:
        episode, first, length = int(self.episodes[index]), self.trim[0], int(self.lengths[index])
        texts = self.data.texts(episode, self.language, slice(first, first + length))
        return Clip(f"{self.data.name}:{self.data.first + episode}", first, length, texts)
