"""Chunks that follow each other without a stall: what is still being carried out when the next is asked for.

Real-time chunking: Black, Galliker and Levine 2025 (arXiv 2506.07339).
"""

import operator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from defi.errors import UserError


@dataclass(frozen=True, eq=False)
class UnderWay:
    """What lies ahead of the chunk that a robot carries out, at the time of an observation.

    actions: n of them, the next first, in the robot's units and as they are sent, gripper snapped.
    delay: d ≤ n: so many of them will have been carried out when the answer to the observation arrives. The
        first d actions of the answer are these; those after them lean towards the rest, ever less.

    Raises:
        UserError: actions that are no [n, A] of finite numbers, or a delay that does not lie in 0 … n.
    """

    actions: np.ndarray  # float32 [n, A]
    delay: int

    def __post_init__(self) -> None:
        actions, wanted = np.empty(0), "give finite numbers [n, A], actions in robot units"
        with suppress(ValueError):  # lists of unequal length
            actions = np.asarray(self.actions)
        if actions.ndim != 2 or actions.dtype.kind not in "fiu":
            raise UserError(f"under_way: is {actions.dtype} {list(actions.shape)}; {wanted}")
        with np.errstate(over="ignore"):
            actions = actions.astype(np.float32)
        if not np.isfinite(actions).all():
            raise UserError(f"under_way: holds NaN or infinite numbers; {wanted}")
        try:
            delay = operator.index(self.delay)  # numpy's integers too
        except TypeError:
            delay = -1
        if not 0 <= delay <= len(actions):
            raise UserError(f"delay={self.delay}: {len(actions)} actions are under way; give 0 … that many")
        object.__setattr__(self, "actions", actions)
        object.__setattr__(self, "delay", delay)

    def check(self, chunk: int, action_dim: int) -> None:
        """Raises UserError if no chunk [K, A] of a policy can go on from these actions."""
        n, numbers = self.actions.shape
        if numbers != action_dim or n > chunk:
            wanted = f"at most {chunk} actions of {action_dim} numbers"
            raise UserError(f"under_way: is [{n}, {numbers}]; this policy takes {wanted}")
