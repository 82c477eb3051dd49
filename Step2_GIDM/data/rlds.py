"""RLDS data sets (Open X-Embodiment) as a source of pairs. Their actions are not read."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from defi.rlds import RLDSDataset
from Step2_GIDM.data.pairs import Clip


class EpisodeClips(Sequence[Clip]):
    """One clip per episode, named `data set:number in its split`. Made when asked for: there are millions."""

    def __init__(self, data: RLDSDataset, language: str | None) -> None:
        self.data, self.language = data, language

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, episode: int) -> Clip:
        if not 0 <= episode < len(self):
            raise IndexError(episode)
        name = f"{self.data.name}:{self.data.first + episode}"
        return Clip(name, 0, int(self.data.lengths[episode]), self.data.text(episode, self.language))

    def number(self, clip: Clip) -> int:
        """Which episode a clip is."""
        return int(clip.name.rpartition(":")[2]) - self.data.first


class RLDSClips:
    """One clip per episode.

    Args:
        image: picture, a key under `steps/observation`; None: the only one.
        language: instruction, a path under `steps`; None: where data sets usually keep it, "" if nowhere.
    """

    def __init__(self, data: RLDSDataset, *, image: str | None = None, language: str | None = None) -> None:
        self.data, self.picture = data, data.picture(image)
        self.clips = EpisodeClips(data, data.language(language))

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        return self.data.frames(self.clips.number(clip), positions, self.picture)
