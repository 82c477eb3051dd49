"""Several data sets of samples as one, each with its share of an epoch."""

import hashlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from defi.errors import UserError

HEAVIEST = 10**6  # weight: places of an epoch are counted in 64 bits
Samples = TypeVar("Samples")


class Mixture(Generic[Samples]):
    """An epoch has `places` for each set: its weight times its size, rounded.

    With twice as many places as samples each sample of the set comes twice in an epoch; with a tenth a place
    stands for ten neighbouring samples, of which the epoch's generator draws one. The order over all places
    is the engine's.

    sets: each with a length, a `fingerprint` and `sample(index, rng)`. sizes: by name, of sets whose share
    counts something other than their samples.

    Raises:
        UserError: a weight is not above 0, or too large.
    """

    def __init__(
        self,
        sets: Mapping[str, Samples],
        weights: Mapping[str, float],
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        for name, weight in weights.items():
            if not 0 < weight <= HEAVIEST:
                raise UserError(f"data.sets.{name}.weight={weight}: must be above 0 and at most {HEAVIEST:,}")
        sizes = {name: len(data) for name, data in sets.items()} | dict(sizes or {})
        self.sets = sets
        self.places = {name: max(1, round(weights[name] * sizes[name])) for name in sets}
        self._ends = np.cumsum(list(self.places.values()))
        lines = "".join(f"{name} {data.fingerprint} {self.places[name]}\n" for name, data in sets.items())
        self.fingerprint = hashlib.sha256(lines.encode()).hexdigest()[:16]

    def shares(self) -> dict[str, float]:
        """Share of each set in an epoch."""
        return {name: count / len(self) for name, count in self.places.items()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def member(self, index: int, u: float) -> tuple[Samples, int]:
        """The set and its sample at place `index`; u in [0, 1) chooses among those the place stands for."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        name = list(self.sets)[which]
        samples, count = self.sets[name], self.places[name]
        place = index - int(self._ends[which]) + count
        return samples, min(int((place + u) * len(samples) / count), len(samples) - 1)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """As the set's, of the sample at a place; without a generator the first that it stands for."""
        samples, number = self.member(index, 0 if rng is None else rng.random())
        return samples.sample(number, rng)
