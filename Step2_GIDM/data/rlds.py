"""RLDS data sets (Open X-Embodiment) as a source of pairs. Their actions are not read."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.rlds import RLDSDataset
from Step2_GIDM.data.pairs import Clip


class EpisodeClips(Sequence[Clip]):
    """One clip per episode, named `data set:number in its split`. Made when asked for: there are millions."""

    def __init__(
        self, data: RLDSDataset, language: str | None, *, trim: Sequence[int], drop_unlabelled: bool
    ) -> None:
        self.data, self.language, self.trim = data, language, trim
        kept = data.labelled(language, trim) if drop_unlabelled else np.ones(len(data), bool)
        self.episodes = kept.nonzero()[0]
        self.lengths = (data.lengths[self.episodes] - sum(trim)).clip(0)

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(index)
        episode = int(self.episodes[index])
        first, length = self.trim[0], int(self.lengths[index])
        texts = self.data.texts(episode, self.language, slice(first, first + length))
        return Clip(f"{self.data.name}:{self.data.first + episode}", first, length, texts)

    def number(self, clip: Clip) -> int:
        """Which episode a clip is."""
        return int(clip.name.rpartition(":")[2]) - self.data.first


class RLDSClips:
    """One clip per episode.

    Args:
        image: picture, a key under `steps/observation`; None: the only one.
        language: instruction, a path under `steps`; None: where data sets usually keep it, "" if nowhere.
        trim: how many steps are left out at the start and at the end of every episode.
        drop_unlabelled: leave out episodes without an instruction at any step that is left.

    Raises:
        UserError: no episode has one.
    """

    def __init__(
        self,
        data: RLDSDataset,
        *,
        image: str | None = None,
        language: str | None = None,
        trim: Sequence[int] = (0, 0),
        drop_unlabelled: bool = False,
    ) -> None:
        self.data, self.picture = data, data.picture(image)
        self.clips = EpisodeClips(
            data, data.language(language), trim=trim, drop_unlabelled=drop_unlabelled
        )
        self.lengths, self.dropped = self.clips.lengths, len(data) - len(self.clips)
        said = f"{data.folder}: of {len(data):,} episodes of {data.split.name}"
        if not len(self.clips):
            raise UserError(f"{said} none has an instruction; data.drop_unlabelled=false keeps them")
        if self.dropped:
            warnings.warn(
                f"{said} {self.dropped:,} are left out: they have no instruction (data.drop_unlabelled)",
                stacklevel=2,
            )

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        steps = [clip.start + position for position in positions]
        return self.data.frames(self.clips.number(clip), steps, self.picture)
