"""The policy of a rollout: a DeFI checkpoint, and the observations of many simulators answered in batches."""

import os
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from defi.config import flatten
from defi.engine.checkpoint import find_weights, read_manifest, read_run_config
from defi.engine.data import seed_of
from defi.engine.weights import fingerprint
from defi.errors import UserError
from Step3_DeFI.config import PRECISIONS
from Step3_DeFI.observation import observe
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.simulator import Actions, Observation


class ModelPolicy:
    """A DeFI model as a policy, on the model's device.

    Args:
        precision: of the computation: no (the weights' own), fp16 or bf16.
        diffusion: what to change of the checkpoint's `ActionDiffusionConfig`: sampler, steps, guidance.
    """

    def __init__(self, model: DeFI, *, precision: str = "no", **diffusion: Any) -> None:
        self.model = model.eval()
        model.config.diffusion = replace(model.config.diffusion, **diffusion)
        self._autocast = {"dtype": PRECISIONS[precision], "enabled": precision != "no"}

    def act(self, observations: Sequence[Observation]) -> Float[np.ndarray, "B K 7"]:
        """A chunk of K actions per observation, scaled as in the data. Noise depends on its seed alone."""
        images = torch.stack([observe(each.images, self.model.image_size) for each in observations])
        noise = self.model.noise(torch.tensor([seed_of("rollout", *each.seed) for each in observations]))
        texts = [each.instruction for each in observations]
        with torch.autocast(self.model.device.type, **self._autocast):
            return self.model.act(images, texts, noise=noise).float().cpu().numpy()


class Batcher:
    """Collects observations and calls the policy, in batches that change nothing about the answers.

    A network's floating-point result for a sample may depend on how many samples share the batch and on the
    sample's row, never on what the other rows hold. So that a chain's actions are the same on any number of
    processes, every batch has the same number of rows (empty ones are filled up), and a chain always takes
    the same row: its index modulo `batch`.

    Args:
        policy: a `ModelPolicy`, or anything else with its `act`.
        batch: rows of every call.
        chunk: actions of each answer that are executed; None for all.
    """

    def __init__(self, policy: ModelPolicy, batch: int, chunk: int | None = None) -> None:
        self.policy, self.batch, self.chunk = policy, batch, chunk
        self._waiting: list[tuple[Hashable, Observation, float]] = []  # who, with what, since when
        self._call_seconds = 0.0
        self.calls = 0

    def row(self, chain: int) -> int:
        return chain % self.batch

    def add(self, asker: Hashable, observation: Observation) -> None:
        """An observation of `asker`, who waits for the answer."""
        self._waiting.append((asker, observation, time.monotonic()))

    def patience(self, coming: int) -> float | None:
        """Seconds to wait for more observations before calling the policy; None if nobody waits.

        A full batch goes at once, and so does one that nobody else can join (`coming` counts the simulators
        at work). Otherwise half a call's duration is waited: a call costs the same, however full.
        """
        if not self._waiting:
            return None
        if not coming or len({self.row(seen.seed[1]) for _, seen, _ in self._waiting}) == self.batch:
            return 0.0
        return max(0.0, self._waiting[0][2] + self._call_seconds / 2 - time.monotonic())

    def answer(self) -> Iterator[tuple[Hashable, Actions]]:
        """Call the policy once for the longest waiting observation of each row.

        Raises:
            UserError: the policy returns something that is not a finite chunk of 7-D actions.
        """
        picked: dict[int, tuple[Hashable, Observation]] = {}
        waiting, self._waiting = self._waiting, []
        for asker, observation, since in waiting:
            if picked.setdefault(self.row(observation.seed[1]), (asker, observation))[0] is not asker:
                self._waiting.append((asker, observation, since))
        filler = next(iter(picked.values()))
        began = time.monotonic()
        batch = [picked.get(row, filler)[1] for row in range(self.batch)]
        actions = np.asarray(self.policy.act(batch))
        self._call_seconds = time.monotonic() - began
        self.calls += 1
        if actions.ndim != 3 or actions.shape[::2] != (self.batch, 7) or not actions.shape[1]:
            raise UserError(
                f"the policy returned actions of shape {actions.shape}, the simulator takes "
                f"({self.batch}, K, 7): position, rotation, gripper; use a checkpoint trained on rel_actions"
            )
        for row, (asker, observation) in picked.items():
            if not np.isfinite(actions[row]).all():
                _, chain, number = observation.seed
                raise UserError(
                    f"chain {chain}, {observation.task}, observation {number}: the policy returned NaN or "
                    "infinite actions; its weights or its precision are broken, try another checkpoint"
                )
            yield asker, actions[row, : self.chunk]


def load_policy(
    checkpoint: Path | str,
    *,
    device: torch.device | str = "cpu",
    precision: str = "no",
    **sources: str | None,
) -> DeFI:
    """The model of a stage-3 run or checkpoint, for acting.

    Args:
        precision: in which it will act. The UNet's weights are kept in it: half the memory, and 1.5 billion
            numbers need not be converted for every observation.
        sources: where its `gfdm` and `gidm` lie now, if elsewhere.

    Raises:
        UserError: no complete stage-3 checkpoint there.
    """
    model = DeFI.from_pretrained(find_weights(checkpoint, DeFI.stage), **sources)
    if precision != "no":
        nn.Module.to(model.gfdm.unet, PRECISIONS[precision])  # diffusers' own `to` prints a warning
    return model.to(device)


def trained_precision(checkpoint: Path | str) -> str:
    """The precision that a checkpoint was trained with; `no` where nothing is known of its training."""
    precision = flatten(read_run_config(checkpoint)).get("trainer.precision", "no")
    if precision not in PRECISIONS:
        trained = f"{checkpoint}: was trained with trainer.precision={precision}"
        raise UserError(f"{trained}; give precision= no, fp16 or bf16")
    return precision


def identify(checkpoint: Path | str) -> dict[str, Any]:
    """What the record says about a checkpoint: where, which weights, which step."""
    manifest = read_manifest(checkpoint, DeFI.stage)
    known = {key: manifest[key] for key in ("step", "preset", "version")}
    return {"checkpoint": str(checkpoint), "fingerprint": fingerprint(find_weights(checkpoint)), **known}


@contextmanager
def policy_threads(threads: int | None = None, *, ranks: int = 1) -> Iterator[int]:
    """Let PyTorch use `threads` threads, by default one processor less than there are, and put it back after.

    With a thread on every processor, PyTorch's threads wait for each other while the simulators run: measured
    on two busy cores, a policy with two threads was several times slower than with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // ranks - 1))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
