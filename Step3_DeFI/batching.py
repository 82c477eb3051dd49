"""One policy for several askers: batches that change nothing about the answers."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from defi.robot.chunk import UnderWay
from Step3_DeFI.acting import Observation, Policy


@dataclass(frozen=True, eq=False)
class Question:
    """An observation of `asker`, who waits for the answer. row: of the batch."""

    asker: Any
    observation: Observation
    seed: int
    row: int
    under_way: UnderWay | None = None
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects questions and calls the policy.

    A network's floating-point result for a sample may depend on how many samples share the batch and on the
    sample's row, never on what the other rows hold. So that answers do not depend on who else asks, every
    batch has the same number of rows (empty ones are filled up), and the asker chooses a question's row by
    what the question is, not by who else is there.

    Args:
        policy: or anything else with its `infer_batch`.
        batch: rows of every call.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        self.policy, self.batch = policy, batch
        self.waiting: list[Question] = []

    def take(self) -> dict[int, Question]:
        """By rows, the questions of the next call: of each row the one that has waited longest."""
        picked: dict[int, Question] = {}
        for question in self.waiting:
            picked.setdefault(question.row, question)
        self.waiting = [question for question in self.waiting if picked[question.row] is not question]
        return picked

    def ask(self, picked: dict[int, Question]) -> Float[np.ndarray, "B K A"]:
        """Call the policy once."""
        filler = next(iter(picked.values()))
        batch = [picked.get(row, filler) for row in range(self.batch)]
        observations, seeds = [each.observation for each in batch], [each.seed for each in batch]
        under_way = [each.under_way for each in batch]
        chosen = {"under_way": under_way} if any(under_way) else {}
        return np.asarray(self.policy.infer_batch(observations, seeds, **chosen))
