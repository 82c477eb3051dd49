"""The running average at the terminal while chains finish."""

from collections.abc import Iterable

import numpy as np

from defi.engine.log import ProgressDisplay
from Step3_DeFI.rollout.messages import ChainResult
from Step3_DeFI.rollout.statistics import CONFIDENCE_Z, lengths


class RolloutProgress:
    """A bar with the average length so far, its 95 % interval, and the time left. A context manager."""

    def __init__(self, title: str, total: int, done: int, limit: int, *, enabled: bool) -> None:
        self.limit = limit
        self.display = ProgressDisplay(title, total, done, enabled=enabled)

    def show(self, chains: Iterable[ChainResult]) -> None:
        """After each finished chain."""
        values = lengths(list(chains), self.limit)
        if len(values):
            self.display.show(len(values), running_average(values))

    def __enter__(self) -> "RolloutProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.display.close()


def running_average(values: np.ndarray) -> str:
    """Mean and 95 % interval, by the normal approximation."""
    if len(values) < 2:
        return f"average length {values.mean():.2f}"
    half = CONFIDENCE_Z * values.std(ddof=1) / np.sqrt(len(values))
    return f"average length {values.mean():.2f} ± {half:.2f}"
