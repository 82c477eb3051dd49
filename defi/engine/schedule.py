"""Learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

import math

from defi.engine.config import TrainerConfig


def learning_rate(step: int, trainer: TrainerConfig) -> float:
    """Rate of the optimizer step number `step` (the first is 0)."""
    if trainer.schedule == "tri_stage":
        return tri_stage(
            step,
            lr=trainer.lr,
            total_steps=trainer.max_steps,
            phases=trainer.phases,
            start_scale=trainer.start_scale,
            end_scale=trainer.end_scale,
        )
    warmup_steps = int(trainer.warmup * trainer.max_steps)
    return trainer.lr * min(1.0, (step + 1) / (warmup_steps + 1))


def tri_stage(
    step: int,
    *,
    lr: float,
    total_steps: int,
    phases: tuple[float, float, float],
    start_scale: float,
    end_scale: float,
) -> float:
    """Linear warm-up from start_scale·lr to lr, hold, half a cosine down to end_scale·lr, which then stays.

    Args:
        phases: shares of `total_steps` (each rounded down to whole steps) of warm-up, hold and cosine.
    """
    warmup, hold, decay = (int(share * total_steps) for share in phases)
    first, last = start_scale * lr, end_scale * lr
    if step < warmup:
        return first + (lr - first) / warmup * step
    if step < warmup + hold:
        return lr
    if step < warmup + hold + decay:
        progress = (step - warmup - hold) / decay
        return last + 0.5 * (lr - last) * (1 + math.cos(math.pi * progress))
    return last
