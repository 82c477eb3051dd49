"""The parts of a run as it opens: processes, optimizer, and the state of a checkpoint."""

import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer

from defi.config import flatten
from defi.engine import checkpoint, sharding
from defi.engine.config import TrainerConfig
from defi.engine.ema import EMA
from defi.engine.model import StageModel
from defi.engine.resume import OPTIMIZER, Progress, optimizer_tensors
from defi.engine.weights import load_strict, read_tensors
from defi.errors import UserError

LONGEST_WAIT = timedelta(hours=2)  # of the other processes while the main one samples, rolls out or saves


def start_processes(trainer: TrainerConfig, tracker: str | None, output: Path) -> Accelerator:
    """Join the processes that `accelerate launch` started, or be the only one.

    Raises:
        UserError: the precision is not available here, or not for a sharded model.
    """
    if sharding.requested() and trainer.precision == "fp16":
        raise UserError("trainer.precision=fp16: not for a sharded model; set trainer.precision=bf16")
    # Newer torch has another name for this switch; accelerate's handler knows the old one alone.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    try:
        with sharding.hidden_from_accelerate():
            return Accelerator(
                mixed_precision=trainer.precision,
                log_with=tracker,
                project_dir=output,
                kwargs_handlers=[
                    DistributedDataParallelKwargs(broadcast_buffers=False),
                    InitProcessGroupKwargs(timeout=LONGEST_WAIT),
                ],
            )
    except ValueError as error:
        raise UserError(f"trainer.precision={trainer.precision}: {error}; set trainer.precision=no") from None


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


def restore(
    source: Path,
    progress: Progress,
    model: StageModel,
    ema: EMA | None,
    optimizer: Optimizer,
    scaler: GradScaler | None,
) -> None:
    """Put weights, averages, optimizer and loss scale where the checkpoint `source` left them."""
    averages = source / "ema" if (source / "ema").is_dir() else source
    if ema is not None:
        model.load_weights(averages)
        ema.restart(progress.ema_updates if averages != source else 0)
    model.load_weights(source)
    file = source / "state" / OPTIMIZER
    load_strict(optimizer_tensors(optimizer, model), read_tensors(file), source=file)
    if scaler is not None and progress.scaler is not None:
        scaler.load_state_dict(progress.scaler)


def changes_since(
    source: Path, config: Mapping[str, Any], data: Mapping[str, Any], processes_then: int, processes: int
) -> list[str]:
    """Everything that is not what the checkpoint `source` was trained with."""
    old, new = flatten(checkpoint.read_run_config(source)), flatten(config)
    changes = [
        f"{key}: {old.get(key)} → {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if key not in ("resume", "overwrite", "output") and old.get(key) != new.get(key)
    ]
    if checkpoint.read_manifest(source)["data"] != data:
        changes.append("the training data: samples come in another order from here on")
    if processes != processes_then:
        changes.append(f"processes: {processes_then} → {processes}; same samples, other dropout")
    return changes
