"""Means, rates and differences with what chance alone makes of them."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float, Int

DRAWS = 20_000
Z = 1.959963984540054  # of 95 %


class Rate(TypedDict):
    """A mean or a share of 1, and its 95 % interval."""

    rate: float
    interval: Sequence[float]


class Summary(TypedDict):
    """One score of a run: the mean over episodes with its 95 % interval, rates beside it, counts per task
    ({"solved", "tried"}), and the value of each episode, by which two runs are compared."""

    average: float
    interval: Sequence[float]
    success: list[Rate]
    tasks: dict[str, dict[str, int]]
    values: list[float]


def rate(hits: Sequence[float]) -> Rate:
    """A share, with Wilson's interval."""
    from scipy.stats import binomtest  # takes a second, which simulator processes need not wait

    test = binomtest(sum(map(bool, hits)), len(hits))
    return {"rate": test.statistic, "interval": list(map(float, test.proportion_ci(method="wilson")))}


def weighted_rate(
    hits: Sequence[float] | np.ndarray,
    weights: Float[np.ndarray, " N"],
    units: Sequence[int] | np.ndarray | None = None,
) -> Rate:
    """A weighted share, with Wilson's interval for the effective number of trials, (Σw)² / Σw² (Kish).

    units: which trial each hit is of, where one was repeated: repeats may all end alike, so they count once.
    """
    each = weights if units is None else np.bincount(units, weights)
    n = each.sum() ** 2 / (each**2).sum()
    share = min(float(weights @ np.asarray(hits, np.float64) / weights.sum()), 1.0)
    middle, half = share + Z**2 / (2 * n), Z * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    interval = [float((middle + side * half) / (1 + Z**2 / n)) for side in (-1, 1)]
    return {"rate": share, "interval": interval}


def nested_weights(groups: Sequence[tuple[Hashable, ...]]) -> Float[np.ndarray, " N"]:
    """Weights of a mean of means, which sum to 1: over the first entries of the groups, within each of these
    over the second ones, and so on."""
    sizes = Counter(groups)
    weights = 1 / np.array([sizes[group] for group in groups], np.float64)
    for depth in range(len(groups[0])):
        kinds = Counter(each[:depth] for each in {group[: depth + 1] for group in groups})
        weights /= [kinds[group[:depth]] for group in groups]
    return weights


def mean_interval(values: Sequence[float] | Int[np.ndarray, " N"]) -> tuple[float, float]:
    """95 % interval of a mean, by the percentile bootstrap. Seeded: the same values, the same interval.

    The values are few different ones, so a resample is a draw of how often each occurs (a multinomial).
    """
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=DRAWS)
    low, high = np.quantile(drawn @ distinct / len(values), [0.025, 0.975])
    return float(low), float(high)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Mean of b − a over the same episodes, its 95 % interval, and how likely chance alone is.

    Returns:
        difference, interval; p: the share of random sign flips of the paired differences whose mean is at
        least as far from zero (two-sided permutation test); differs: whether p < 0.05.
    """
    change: Int[np.ndarray, " N"] = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    sizes, counts = np.unique(np.abs(change), return_counts=True)
    # Flipping n differences of size s at random leaves s·(2·heads − n), heads ~ Binomial(n, ½).
    heads = np.random.default_rng(0).binomial(counts, 0.5, size=(DRAWS, len(counts)))
    far = abs(change.sum()) * (1 - 1e-12)  # sums of fractions are rounded
    extreme = int((np.abs((2 * heads - counts) @ sizes) >= far).sum())
    p, interval = (extreme + 1) / (DRAWS + 1), mean_interval(change)
    return {"difference": float(change.mean()), "interval": interval, "p": p, "differs": p < 0.05}
