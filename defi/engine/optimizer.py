"""What moves the weights: AdamW over everything that is trained, its learning rate, averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW, Optimizer

from defi.engine.config import TrainerConfig
from defi.engine.model import StageModel


def learning_rate(step: int, trainer: TrainerConfig) -> float:
    """Rate of the optimizer step number `step` (the first is 0).

    constant: `lr` after a linear warm-up over the share `warmup` of the steps.
    tri_stage: linear warm-up from start_scale·lr to lr, hold, half a cosine down to end_scale·lr, which then
    stays; `phases` are their shares of `max_steps`, each rounded down to whole steps.
    """
    lr = trainer.lr
    if trainer.schedule == "constant":
        return lr * min(1.0, (step + 1) / (int(trainer.warmup * trainer.max_steps) + 1))
    warmup, hold, decay = (int(share * trainer.max_steps) for share in trainer.phases)
    first, last = trainer.start_scale * lr, trainer.end_scale * lr
    if step < warmup:
        return first + (lr - first) / warmup * step
    if step < warmup + hold:
        return lr
    if step < warmup + hold + decay:
        progress = (step - warmup - hold) / decay
        return last + 0.5 * (lr - last) * (1 + math.cos(math.pi * progress))
    return last


def build_optimizer(model: StageModel, trainer: TrainerConfig, accelerator: Accelerator) -> Optimizer:
    """AdamW over everything that is trained, norms and biases included, as the recipes have it.

    Its moments exist from the start: a micro-batch that fits now fits later, and every checkpoint has them.
    """
    parameters = [parameter for _, parameter in model.trainable()]
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = AdamW(
        parameters, lr=trainer.lr, betas=trainer.betas, weight_decay=trainer.weight_decay, fused=fused
    )
    prepared = accelerator.prepare_optimizer(optimizer)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return prepared


def optimizer_tensors(optimizer: Optimizer, model: StageModel) -> dict[str, Tensor]:
    """The optimizer's tensors as `<kind>.<parameter name>`; its settings are the configuration's."""
    named = ((name, optimizer.state[parameter]) for name, parameter in model.trainable())
    return {f"{kind}.{name}": tensor for name, state in named for kind, tensor in state.items()}


class EMA:
    """average ← average + (1 − d)·(weights − average), d = min(decay, (1 + n)/(10 + n)) at update n.

    The rising decay lets short runs forget their initial weights. Frozen parameters are not averaged.
    """

    def __init__(self, model: StageModel, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = [p for _, p in model.trainable()]
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside this context, and its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average):  # one by one needs little memory
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
