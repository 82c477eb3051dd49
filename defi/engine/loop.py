"""The training loop of every stage: `train` is the run, `train_step` is one optimizer step."""

import math
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from defi.engine import faults
from defi.engine.config import TrainerConfig
from defi.engine.data import Batch
from defi.engine.faults import EXIT_PREEMPTED, Preemption
from defi.engine.model import StageModel
from defi.engine.optimizer import learning_rate
from defi.engine.run import Inspect, Run
from defi.processes import full_tensor, in_any_process


def train(
    model: StageModel,
    dataset: Dataset,
    trainer: TrainerConfig,
    *,
    output: Path | str,
    preview: Inspect | None = None,
    evaluate: Inspect | None = None,
    **settings: Any,
) -> Path:
    """Train `model` on `dataset` for `trainer.max_steps` or `trainer.epochs`; return the last checkpoint.

    Args:
        dataset: map-style, of dict samples; see `defi.engine.data` for random numbers in it.
        output: run folder, gets config.yaml, metrics.jsonl, previews/, rollouts/ and checkpoints/.
        preview: called every `trainer.preview_every` steps with the model (averaged weights if EMA is on,
            eval mode, no gradients), the step and a folder for pictures; returns numbers to log. Only in the
            main process; random numbers it draws do not disturb the training.
        evaluate: the same every `trainer.rollout_every` steps; its numbers also go into the manifests, and
            `trainer.best_metric` is one of them.
        settings: config, seed, resume, overwrite and tracker, as `Run` takes them.

    Raises:
        UserError: something does not fit (`Run`) or fails (`faults.explained`); or the loss or gradient is
            no longer finite: the run stops before that step moves the weights, unless
            `trainer.skip_nonfinite` lets it continue.
        SystemExit: with `EXIT_PREEMPTED`, after saving, when a signal came (`faults.Preemption`).
    """
    output = Path(output)
    with (
        closing(Preemption()) as signals,  # a signal at start is answered after the first step
        faults.explained(output, trainer),
        closing(Run(model, dataset, trainer, output=output, **settings)) as run,
    ):
        return take_steps(run, signals, preview=preview, evaluate=evaluate)


def take_steps(run: Run, signals: Preemption, *, preview: Inspect | None, evaluate: Inspect | None) -> Path:
    """All steps that are left, with what is due after each; returns the last checkpoint's folder."""
    trainer = run.trainer
    if trainer.max_steps == 0:  # to compare with
        run.save()
    for step in range(run.step + 1, trainer.max_steps + 1):
        batches = run.next_batches()
        lr = learning_rate(step - 1, trainer)
        try:
            scalars, loss = train_step(run, batches, lr)
            run.step_done(scalars, loss)
        except FloatingPointError as error:
            run.leave_out(batches, error)
        except torch.OutOfMemoryError as error:
            what = f"trainer.micro_batch={run.feed.micro_batch}: out of memory"
            raise faults.Stopped(f"{what}; lower it (the global batch stays)") from error
        if due(step, trainer.log_every) or step == trainer.max_steps:
            run.log(lr)
        if preview is not None and due(step, trainer.preview_every):
            run.inspect("preview", preview)
        if evaluate is not None and due(step, trainer.rollout_every):
            run.inspect("evaluate", evaluate)
        preempted = in_any_process(signals.received, run.accelerator)
        if due(step, trainer.save_every) or step == trainer.max_steps or run.new_best or preempted:
            run.save()
        if preempted:
            run.settle()
            run.journal.say(f"stopped by a signal after step {step}; continue with resume=true")
            sys.exit(EXIT_PREEMPTED)
    return run.finish()


def train_step(run: Run, batches: list[Batch], lr: float) -> tuple[dict[str, Tensor], float]:
    """Accumulate the gradients of the micro-batches, clip their norm, and move the weights once.

    Returns the means over the micro-batches of what the model reports, with `grad_norm` before clipping, and
    the loss over all processes.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the weights have not been moved.
    """
    accelerator, model, optimizer = run.accelerator, run.wrapped, run.optimizer
    for group in optimizer.param_groups:
        group["lr"] = lr
    means: dict[str, Tensor] = {}
    for i, batch in enumerate(batches, start=1):
        with nullcontext() if i == len(batches) else accelerator.no_sync(model):
            scalars = model(batch)
            accelerator.backward(scalars["loss"] / len(batches))
        for name, value in scalars.items():
            share = value.detach() / len(batches)
            means[name] = means[name] + share if name in means else share
    norm = accelerator.clip_grad_norm_(model.parameters(), run.trainer.clip or math.inf)
    means["grad_norm"] = full_tensor(norm)
    loss = check_finite(means["loss"], means["grad_norm"], accelerator)
    optimizer.step()
    optimizer.zero_grad()
    return means, loss


def check_finite(loss: Tensor, grad_norm: Tensor, accelerator: Accelerator) -> float:
    """The mean loss over all processes; FloatingPointError, in all, if it or the norm is NaN or infinite.

    With fp16 an infinite gradient means that the loss scale is too large: the scaler leaves out the step and
    halves the scale. Only when the scale cannot fall further is it an error.
    """
    numbers = torch.stack([loss.float(), grad_norm.float()])
    if accelerator.num_processes > 1:
        numbers = accelerator.reduce(numbers, "mean")
    mean_loss, norm = numbers.tolist()
    if not math.isfinite(mean_loss):
        raise FloatingPointError(f"the loss is {mean_loss}")
    if not math.isfinite(norm) and (accelerator.scaler is None or accelerator.scaler.get_scale() <= 1):
        raise FloatingPointError(f"the gradient norm is {norm} (loss {mean_loss:.4g})")
    return mean_loss


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens at this one; 0 means never."""
    return every > 0 and step % every == 0
