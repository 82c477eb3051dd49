"""Learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

import math

from defi.engine.config import TrainerConfig


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
