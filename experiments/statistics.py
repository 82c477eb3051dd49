"""What several seeds of training, run on the same chains, say: intervals that hold both kinds of chance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from defi.benchmarks.statistics import paired_difference
from Step3_DeFI.rollout.results import Results

DRAWS = 5_000


def crossed_interval(values: Float[np.ndarray, "S N"], seed: int = 0) -> tuple[tuple[float, float], float]:
    """95 % interval of the mean over seeds and chains, and how likely chance alone puts it beyond 0.

    A bootstrap that draws seeds and, independently, chains: both are crossed, since each seed ran the same
    chains (Owen, The pigeonhole bootstrap, 2007). Of S seeds it draws S − 1: drawing S of so few would make
    the variance too small by (S − 1) / S (Rao and Wu, 1988). With one seed it holds the chance of the chains
    alone.

    Returns:
        (low, high), and twice the smaller share of draws on either side of 0.
    """
    seeds, chains = values.shape
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(chains, np.full(chains, 1 / chains), size=DRAWS) / chains
    of_seeds = weights @ values.T
    chosen = draw.integers(seeds, size=(DRAWS, max(seeds - 1, 1)))
    means = np.take_along_axis(of_seeds, chosen, axis=1).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    return (float(low), float(high)), min(1.0, 2 * max(float(beyond), 1 / DRAWS))


def matrix(found: Mapping[int, Results], limit: int) -> Float[np.ndarray, "S N"]:
    """Length of each chain, a row per seed."""
    return np.array([found[seed].scores[str(limit)]["values"] for seed in sorted(found)])


def summarise(found: Mapping[int, Results], limit: int) -> dict[str, Any]:
    """One arm at one limit: mean with its interval, and each seed's."""
    values = matrix(found, limit)
    interval, _ = crossed_interval(values)
    of_seeds = {seed: float(row.mean()) for seed, row in zip(sorted(found), values)}
    return {"mean": float(values.mean()), "interval": interval, "seeds": of_seeds}


def difference(
    first: Mapping[int, Results], other: Mapping[int, Results], limit: int
) -> dict[str, Any] | None:
    """`other` − `first`, chain by chain and seed by seed, of the seeds that both have; None: they share none.

    A seed is the same in both: where two arms share a stage, they have the very same one.
    """
    seeds = sorted(first.keys() & other.keys())
    if not seeds:
        return None
    a, b = (matrix({seed: part[seed] for seed in seeds}, limit) for part in (first, other))
    interval, p = crossed_interval(b - a)
    each = {seed: paired_difference(x, y) for seed, x, y in zip(seeds, a, b)}
    return {"difference": float((b - a).mean()), "interval": interval, "p": p, "seeds": each}
