"""Exponential moving average of the trained parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from defi.engine.model import StageModel


class EMA:
    """average ← average + (1 − d)·(weights − average), d = min(decay, (1 + n)/(10 + n)) at update n.

    The rising decay lets short runs forget their initial weights. Frozen parameters are not averaged.
    """

    def __init__(self, model: StageModel, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = [p for _, p in model.trainable()]
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside this context, and its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange weights and averages, one tensor after the other to need little memory."""
        for parameter, average in zip(self.parameters, self.average):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
