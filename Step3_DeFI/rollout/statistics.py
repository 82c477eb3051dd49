"""What chains say about a policy, and how sure that is.

A chain's length is the number of its leading tasks solved within a limit of control steps each. One run at
the largest limit holds the scores at all smaller ones: a task solved too late ends the chain there.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from Step3_DeFI.rollout.messages import ChainResult

CONFIDENCE_Z = 1.959963984540054  # two-sided 95 % of a normal distribution
DRAWS = 20_000


def solved_within(taken: int | None, limit: int) -> bool:
    return taken is not None and taken <= limit


def chain_length(steps: Sequence[int | None], limit: int) -> int:
    """Leading tasks solved within `limit` control steps each."""
    length = 0
    for taken in steps:
        if not solved_within(taken, limit):
            break
        length += 1
    return length


def lengths(chains: Sequence[ChainResult], limit: int) -> Int[np.ndarray, " N"]:
    return np.array([chain_length(chain.steps, limit) for chain in chains], dtype=np.int64)


def bootstrap_means(values: Int[np.ndarray, " N"], draws: int = DRAWS) -> Float[np.ndarray, " draws"]:
    """Means of resamples with replacement. Seeded: the same values give the same interval.

    The values are few integers, so a resample is a draw of how often each occurs (a multinomial).
    """
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=draws)
    return drawn @ distinct / len(values)


def mean_interval(values: Int[np.ndarray, " N"]) -> tuple[float, float]:
    """95 % interval of the mean, by the percentile bootstrap over chains. Without spread it has no width."""
    low, high = np.quantile(bootstrap_means(values), [0.025, 0.975])
    return float(low), float(high)


def rate_interval(solved: int, tried: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson's), meaningful also where none or all succeed."""
    z2 = CONFIDENCE_Z**2
    rate = solved / tried
    middle = (rate + z2 / (2 * tried)) / (1 + z2 / tried)
    half = CONFIDENCE_Z / (1 + z2 / tried) * math.sqrt(rate * (1 - rate) / tried + z2 / (4 * tried**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def task_counts(chains: Sequence[ChainResult], limit: int) -> dict[str, dict[str, int]]:
    """Per task, how often it was tried and solved: a task is tried where all before it were solved."""
    tried: Counter[str] = Counter()
    solved: Counter[str] = Counter()
    for chain in chains:
        length = chain_length(chain.steps, limit)
        tried.update(chain.tasks[: length + 1])
        solved.update(chain.tasks[:length])
    return {task: {"solved": solved[task], "tried": tried[task]} for task in sorted(tried)}


def summarise(chains: Sequence[ChainResult], limit: int) -> dict[str, Any]:
    """Average length, success at each position, and per-task counts, at one limit."""
    values = lengths(chains, limit)
    positions = range(1, len(chains[0].tasks) + 1)
    reached = [int((values >= position).sum()) for position in positions]
    return {
        "average": float(values.mean()),
        "interval": mean_interval(values),
        "success": [
            {"rate": solved / len(values), "interval": rate_interval(solved, len(values))}
            for solved in reached
        ],
        "tasks": task_counts(chains, limit),
    }


def paired_difference(a: Int[np.ndarray, " N"], b: Int[np.ndarray, " N"]) -> dict[str, Any]:
    """Mean of b − a over the same chains, its 95 % interval, and how likely chance alone is.

    Returns:
        difference, interval; p: the share of random sign flips of the paired differences whose mean is at
        least as far from zero (two-sided permutation test); differs: whether p < 0.05.
    """
    change = b - a
    rng = np.random.default_rng(0)
    sizes, counts = np.unique(np.abs(change), return_counts=True)
    # Flipping n differences of size s at random leaves s·(2·heads − n), heads ~ Binomial(n, ½).
    heads = rng.binomial(counts, 0.5, size=(DRAWS, len(counts)))
    flipped = (2 * heads - counts) @ sizes
    extreme = int((np.abs(flipped) >= abs(int(change.sum()))).sum())
    p = (extreme + 1) / (DRAWS + 1)
    return {
        "difference": float(change.mean()),
        "interval": mean_interval(change),
        "p": p,
        "differs": p < 0.05,
    }
