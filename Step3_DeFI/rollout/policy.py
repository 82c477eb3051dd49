"""The policy of a rollout: a DeFI checkpoint that acts."""

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
from defi.engine.weights import fingerprint
from defi.errors import UserError
from Step3_DeFI.config import PRECISIONS
from Step3_DeFI.observation import observe
from Step3_DeFI.policy import DeFI
from Step3_DeFI.rollout.simulator import Observation


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
    known = {"checkpoint": str(checkpoint), "fingerprint": fingerprint(find_weights(checkpoint))}
    manifest = read_manifest(checkpoint, DeFI.stage)
    return known | {key: manifest[key] for key in ("step", "preset", "version")}


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
