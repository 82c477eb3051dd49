"""The order of samples: every one once per epoch, in an order as from a shuffle, without memory."""

import tracemalloc

import numpy as np
import pytest

from defi.engine.data import Shuffle, StepOrder


def epochs(size: int, number: int, seed: int = 0) -> np.ndarray:
    """The first permutations of a stream [number, size]."""
    epoch, index = Shuffle(size, seed).at(np.arange(number * size))
    assert np.array_equal(epoch, np.repeat(np.arange(number), size))
    return index.reshape(number, size)


def assert_as_by_chance(counts: np.ndarray, freedom: int) -> None:
    """Chi-square of counts that should be equal, against its expectation and deviation."""
    expected = counts.mean()
    assert expected >= 5, "too few for the bound to hold"
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [*range(1, 40), 100, 101, 255, 256, 257, 4096, 65_537, 1_000_003])
def test_every_sample_comes_once_per_epoch(size: int) -> None:
    for permutation in epochs(size, 2, seed=size):
        assert np.array_equal(np.sort(permutation), np.arange(size))


@pytest.mark.parametrize("size", [5, 22, 100, 361])
def test_positions_neighbours_and_epochs_are_as_by_chance(size: int) -> None:
    drawn = epochs(size, 6000 if size < 300 else 2000)
    places = np.stack([np.bincount(column, minlength=size) for column in drawn.T])
    assert_as_by_chance(places, size * (size - 1))
    assert_as_by_chance(np.bincount(((drawn[1:] - drawn[:-1]) % size).ravel(), minlength=size), size - 1)
    steps = np.bincount((np.diff(drawn, axis=1) % size).ravel(), minlength=size)
    assert steps[0] == 0
    assert_as_by_chance(steps[1:], size - 2)


def test_large_sets_keep_no_neighbours_and_no_trend() -> None:
    size = 200_000
    first, second = epochs(size, 2)
    for order in (first, second):
        beside = np.isin(np.abs(np.diff(order)), (1, 2, 3)).sum()
        assert abs(beside - 6) < 6 * np.sqrt(6), "of a shuffle, as many as by chance"
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
        halves = np.bincount(2 * (np.arange(size) >= size // 2) + (order >= size // 2), minlength=4)
        assert np.abs(halves - size / 4).max() < 5 * np.sqrt(size / 4)
    assert (first == second).sum() < 8
    assert (first == epochs(size, 1, seed=1)[0]).sum() < 8


def test_a_hundred_million_samples_take_no_memory() -> None:
    tracemalloc.start()
    order = iter(StepOrder(10**8, seed=0, start=3 * 10**11, global_batch=64, micro_batch=64, process=(1, 2)))
    draws = [draw for _ in range(100) for draw in next(order)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    assert {epoch for epoch, _ in draws} == {3000}
    assert len(set(draws)) == 3200 and all(0 <= index < 10**8 for _, index in draws)
