"""Shuffling without memory: the permutation of each epoch, computed where it is looked at."""

import math

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 12  # as many as the smallest data sets need to look shuffled
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Shuffle:
    """An endless stream of the numbers below `size`: one keyed pseudo-random permutation per epoch.

    A Feistel network over pairs (left, right) of numbers below a and b, a·b ≥ size, that adds a hash of one
    half to the other, in turn: invertible, so a permutation of a·b numbers. What comes out beyond `size` is
    put in again until it does not, which leaves a permutation of `size` numbers (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains", sections 4 and 5). Hash: the finaliser of SplitMix64 (Steele et
    al. 2014). Statistically a shuffle, not a cipher. No memory that grows with `size`.
    """

    def __init__(self, size: int, seed: int) -> None:
        left = math.isqrt(size - 1) + 1
        self.size, self.left, self.right = np.uint64(size), np.uint64(left), np.uint64(-(-size // left))
        self._keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def at(self, positions: Int64[np.ndarray, " N"]) -> tuple[Int64[np.ndarray, " N"], ...]:
        """Epochs and numbers at these positions of the stream; every `size` positions are an epoch."""
        epochs, numbers = np.divmod(positions.astype(np.uint64), self.size)
        keys = _hash(self._keys[:, None] + epochs * GOLDEN)
        numbers = self._permuted(numbers, keys)
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._permuted(numbers[outside], keys[:, outside])
        return epochs.astype(np.int64), numbers.astype(np.int64)

    def _permuted(
        self, numbers: UInt64[np.ndarray, " N"], keys: UInt64[np.ndarray, "K N"]
    ) -> UInt64[np.ndarray, " N"]:
        left, right = np.divmod(numbers, self.right)
        for even, odd in zip(keys[::2], keys[1::2]):
            left = (left + _hash(right + even) % self.left) % self.left
            right = (right + _hash(left + odd) % self.right) % self.right
        return left * self.right + right


def _hash(x: UInt64[np.ndarray, " *N"]) -> UInt64[np.ndarray, " *N"]:
    """64 well-mixed bits for each number."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
