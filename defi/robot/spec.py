"""What a robot sees and does: made from its data, kept in policy checkpoints, checked where both meet."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

NORMALISATIONS = ("none", "mean_std", "bounds")
Numbers = TypeVar("Numbers", np.ndarray, Any)  # an array or a tensor [..., A]


@dataclass
class Vector:
    """Actions or state, per dimension. Lists other than `names` are as long as it.

    units: "" where unknown. relative: a change, not a place or pose.
    normalisation: none; mean_std; or bounds: the quantiles 0.01 … 0.99 to −1 … 1.
    offset, scale: what the networks see is (value − offset) / scale.
    low, high: smallest and largest value in the training data; empty where nobody looked.
    """

    names: list[str]
    units: list[str]
    relative: list[bool]
    normalisation: list[str]
    offset: list[float]
    scale: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    @classmethod
    def plain(cls, names: Sequence[str]) -> "Vector":
        """Of these numbers nothing is known, and nothing is done to them."""
        size = len(names)
        return cls(list(names), [""] * size, [False] * size, ["none"] * size, [0.0] * size, [1.0] * size)

    def __len__(self) -> int:
        return len(self.names)

    def normalise(self, values: Numbers) -> Numbers:
        """Robot's units → what the networks see."""
        return (values - _like(self.offset, values)) / _like(self.scale, values)

    def restore(self, values: Numbers) -> Numbers:
        """What the networks see → robot's units."""
        return values * _like(self.scale, values) + _like(self.offset, values)


def _like(numbers: list[float], values: Numbers) -> Numbers:
    is_array = isinstance(values, np.ndarray)
    return np.asarray(numbers, values.dtype) if is_array else values.new_tensor(numbers)


@dataclass
class Gripper:
    """The dimension of an action that moves the gripper: at rollout values above `threshold` become `above`,
    others `below`. opens: whether `above` opens it. held: the command stays until another one comes."""

    dimension: int
    threshold: float = 0.0
    above: float = 1.0
    below: float = -1.0
    opens: bool = True
    held: bool = False


@dataclass
class Robot:
    """What a robot sees and does.

    cameras: names of the views V, in order; the first is the one that the latent action looks at.
    fps: control steps, and frames, per second; None: unknown.
    executed: actions of a chunk that are carried out before the next look; None: all.
    """

    cameras: list[str]
    actions: Vector
    state: Vector | None = None
    fps: float | None = None
    gripper: Gripper | None = None
    executed: int | None = None
