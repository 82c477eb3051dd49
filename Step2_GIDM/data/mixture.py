"""Several data sets of pairs as one, by weight × size."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from defi.errors import UserError
from Step2_GIDM.data.pairs import Clip, PairDataset

HEAVIEST = 10**6  # weight: places of an epoch are counted in 64 bits


class PairMixture(Dataset):
    """An epoch has round(weight · size) places for each set; its size may count more than the pairs here.

    With twice as many places as pairs each pair of the set comes twice in an epoch; with a tenth a place
    stands for ten neighbouring pairs, of which the sample's generator draws one. The order over all places is
    the engine's. Raises UserError for a weight that is not positive, or beyond all reason.
    """

    def __init__(
        self, sets: Mapping[str, PairDataset], weights: Mapping[str, float], sizes: Mapping[str, int]
    ) -> None:
        for name, weight in weights.items():
            if not 0 < weight <= HEAVIEST:
                raise UserError(f"data.sets.{name}.weight={weight}: must be above 0 and at most {HEAVIEST:,}")
        self.sets = dict(sets)
        self.image_size = next(iter(sets.values())).image_size
        self._sizes = [max(1, round(weights[name] * sizes[name])) for name in sets]
        self._ends = np.cumsum(self._sizes)

    @property
    def fingerprint(self) -> str:
        """Identifies the data and their shares."""
        lines = (f"{n} {d.fingerprint} {size}\n" for (n, d), size in zip(self.sets.items(), self._sizes))
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

    def shares(self) -> dict[str, float]:
        """Share of each set in an epoch."""
        return {name: size / len(self) for name, size in zip(self.sets, self._sizes)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def member(self, index: int, u: float = 0.0) -> tuple[PairDataset, int]:
        """The set and its pair at place `index`; u in [0, 1) chooses among the pairs the place stands for."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        pairs, size = list(self.sets.values())[which], self._sizes[which]
        place = index - int(self._ends[which]) + size
        return pairs, min(int((place + u) * len(pairs) / size), len(pairs) - 1)

    def locate(self, index: int) -> tuple[Clip, int]:
        """As the set's, of the (first) pair at a place."""
        pairs, pair = self.member(index)
        return pairs.locate(pair)

    def frames(self, index: int) -> UInt8[Tensor, "2 3 H W"]:
        """As the set's, of the (first) pair at a place."""
        pairs, pair = self.member(index)
        return pairs.frames(pair)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """As the set's, of a pair at a place."""
        pairs, pair = self.member(index, rng.random())
        return pairs.sample(pair, rng)
