"""Looks of many simulators answered by one policy, in batches that change nothing about the answers.

A network's floating-point result for a sample may depend on how many samples share the batch and on the
sample's row, never on what the other rows hold. So that a chain's actions are the same on any number of
processes, every batch has the same number of rows (`batch`; empty ones are filled up), and the looks of a
chain always take the same row: its index modulo `batch`. Noise comes from each look's own seed.
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float

from defi.errors import UserError
from Step3_DeFI.rollout.messages import Actions, Look


class Policy(Protocol):
    """Chooses actions from pictures and words."""

    def act(self, looks: Sequence[Look]) -> Float[np.ndarray, "B K 7"]:
        """A chunk of K actions per look, scaled as in the data. A look's noise depends on its seed alone."""


class PolicyServer:
    """Collects looks and decides when to ask the policy.

    Args:
        batch: rows of every call.
        chunk: actions of each answer that are executed; None for all.
    """

    def __init__(self, policy: Policy, batch: int, chunk: int | None = None) -> None:
        self.policy, self.batch, self.chunk = policy, batch, chunk
        self._rows: list[dict[Hashable, tuple[float, Look]]] = [{} for _ in range(batch)]
        self._call_seconds = 0.0
        self.calls = 0

    def row(self, chain: int) -> int:
        return chain % self.batch

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def add(self, asker: Hashable, look: Look) -> None:
        """A look of `asker`, who waits for the answer."""
        self._rows[self.row(look.seed[1])][asker] = (time.monotonic(), look)

    def patience(self, coming: int) -> float | None:
        """Seconds to wait for more looks before calling the policy; None if nobody waits.

        A full batch goes at once, and so does one that nobody else can join (`coming` counts the simulators
        at work). Otherwise half a call's duration is waited: a call costs the same, however full.
        """
        if not len(self):
            return None
        if not coming or all(self._rows):
            return 0.0
        oldest = min(since for row in self._rows for since, _ in row.values())
        return max(0.0, oldest + self._call_seconds / 2 - time.monotonic())

    def answer(self) -> Iterator[tuple[Hashable, Actions]]:
        """Call the policy once for the longest waiting look of each row.

        Raises:
            UserError: the policy returns something that is not a finite chunk of 7-D actions.
        """
        picked: list[tuple[Hashable, Look] | None] = []
        for row in self._rows:
            asker = min(row, key=lambda key: row[key][0], default=None)
            picked.append(None if asker is None else (asker, row.pop(asker)[1]))
        filler = next(entry[1] for entry in picked if entry)
        began = time.monotonic()
        actions = self.policy.act([entry[1] if entry else filler for entry in picked])
        self.calls += 1
        self._call_seconds = time.monotonic() - began
        for entry, chunk in zip(picked, check_actions(actions, self.batch)):
            if entry:
                asker, look = entry
                if not np.isfinite(chunk).all():
                    raise UserError(
                        f"chain {look.seed[1]}, {look.task}, look {look.seed[2]}: the policy returned NaN or "
                        "infinite actions; its weights or its precision are broken, try another checkpoint"
                    )
                yield asker, chunk[: self.chunk]


def check_actions(actions: np.ndarray, batch: int) -> Float[np.ndarray, "B K 7"]:
    """`actions`, if they are of the simulator's action space."""
    actions = np.asarray(actions)
    if actions.ndim != 3 or actions.shape[0] != batch or not actions.shape[1] or actions.shape[2] != 7:
        raise UserError(
            f"the policy returned actions of shape {actions.shape}, the simulator takes ({batch}, K, 7): "
            "relative position, rotation, gripper; use a checkpoint trained on CALVIN's rel_actions"
        )
    return actions
