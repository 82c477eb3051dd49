"""Losses that lie far above the recent ones."""

import math
from dataclasses import dataclass


@dataclass
class SpikeWatch:
    """Finds spikes by the exponential mean and variance of the losses before."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    FIRST = 50  # steps without a verdict
    MEMORY = 200  # steps
    DEVIATIONS = 6.0
    FACTOR = 2.0  # and so many times the mean: where all losses are equal, noise is no spike

    def sees(self, loss: float) -> bool:
        """Take in the loss of a step; whether it is a spike."""
        excess = loss - self.mean
        spike = (
            self.steps >= self.FIRST
            and excess > self.DEVIATIONS * math.sqrt(self.variance)
            and loss > self.FACTOR * self.mean
        )
        self.steps += 1
        share = 1 / min(self.steps, self.MEMORY)
        self.mean += share * excess
        self.variance = (1 - share) * (self.variance + share * excess**2)
        return spike
