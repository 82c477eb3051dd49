"""A DeFI model as the policy of a rollout."""

import hashlib
import os
from collections.abc import Iterator, Sequence
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
from defi.errors import UserError
from Step3_DeFI.config import PRECISIONS
from Step3_DeFI.observation import observe
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.evaluate import Evaluation, evaluate
from Step3_DeFI.rollout.messages import Look
from Step3_DeFI.rollout.results import ChainLog

ACTION_DIM = 7


class ModelPolicy:
    """Answers looks with a DeFI model, on the model's device.

    Args:
        sampler, sampler_steps, guidance: of the action diffusion (`ActionDiffusionConfig`); None for the
            checkpoint's own.
        precision: of the computation: no (the weights' own), fp16 or bf16.
    """

    def __init__(
        self,
        model: DeFI,
        *,
        sampler: str | None = None,
        sampler_steps: int | None = None,
        guidance: float | None = None,
        precision: str = "no",
    ) -> None:
        self.model = model.eval()
        given = {"sampler": sampler, "steps": sampler_steps, "guidance": guidance}
        chosen = {name: value for name, value in given.items() if value is not None}
        model.config.diffusion = replace(model.config.diffusion, **chosen)
        self._autocast = {"dtype": PRECISIONS[precision], "enabled": precision != "no"}

    def act(self, looks: Sequence[Look]) -> Float[np.ndarray, "B K 7"]:
        images = torch.stack([observe(look.images, self.model.image_size) for look in looks])
        noise = self.model.noise(torch.tensor([seed_of("rollout", *look.seed) for look in looks]))
        texts = [look.instruction for look in looks]
        with torch.autocast(self.model.device.type, **self._autocast):
            return self.model.act(images, texts, noise=noise).float().cpu().numpy()


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
            numbers need not be converted at every look.
        sources: where its `gfdm` and `gidm` lie now, if elsewhere.

    Raises:
        UserError: no complete stage-3 checkpoint there, or it does not predict CALVIN's seven actions.
    """
    model = DeFI.from_pretrained(find_weights(checkpoint, DeFI.stage), **sources)
    if model.config.action_dim != ACTION_DIM:
        raise UserError(
            f"{checkpoint}: predicts {model.config.action_dim} action values, the simulator takes "
            f"{ACTION_DIM}; use a checkpoint trained on CALVIN's rel_actions"
        )
    if precision != "no":
        nn.Module.to(model.gfdm.unet, PRECISIONS[precision])  # diffusers' own has a warning to tell
    return model.to(device)


def trained_precision(checkpoint: Path | str) -> str:
    """The precision that a checkpoint was trained with; `no` where nothing is known of its training."""
    precision = flatten(read_run_config(checkpoint)).get("trainer.precision", "no")
    if precision not in PRECISIONS:
        raise UserError(
            f"{checkpoint}: was trained with trainer.precision={precision}; give precision= no, fp16 or bf16"
        )
    return precision


def identify(checkpoint: Path | str) -> dict[str, Any]:
    """What the record says about a checkpoint: where, which step, and a hash of its weights."""
    manifest = read_manifest(checkpoint, DeFI.stage)
    digest = hashlib.sha256()
    for file in sorted(find_weights(checkpoint).glob("*.safetensors")):
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    known = {key: manifest[key] for key in ("step", "preset", "version")}
    return {"checkpoint": str(checkpoint), "fingerprint": digest.hexdigest()[:16], **known}


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


def evaluate_policy(
    model: DeFI, evaluation: Evaluation, *, precision: str = "no", output: Path | None = None
) -> dict[str, float]:
    """A rollout during training: averages and success rates under names for a log.

    Args:
        evaluation: a small one (`Evaluation.prepare`); its simulator processes are started for this call.
        precision: the training's.
        output: folder for chains and clips, replacing what an earlier call left there; None keeps nothing.
    """
    if output is not None:
        ChainLog(output, "chains").clear()
    if evaluation.caveat:
        print(evaluation.caveat)
    with policy_threads():
        results = evaluate(
            evaluation, "policy", ModelPolicy(model, precision=precision), output=output, show=False
        )
    summary = results.limits[str(max(evaluation.config.max_steps))]
    rates = {f"success_{i + 1}": success["rate"] for i, success in enumerate(summary["success"])}
    return {"average_length": summary["average"], **rates}
