"""Opening a run: everything is checked and loaded before anything is written."""

import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import set_seed
from omegaconf import OmegaConf
from torch import nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset

from defi.config import flatten
from defi.engine import checkpoint, sharding, state, zero
from defi.engine.config import TrainerConfig
from defi.engine.data import Feed, StepOrder
from defi.engine.ema import EMA
from defi.engine.model import StageModel
from defi.engine.output import check_output, claim, prepare_output, write_file
from defi.engine.progress import ProgressDisplay
from defi.engine.run import Run
from defi.engine.tracking import Journal, find_tracker, open_tracker
from defi.engine.writer import CheckpointWriter, Snapshot
from defi.errors import UserError

LONGEST_WAIT = timedelta(hours=2)  # of the other processes while the main one samples, rolls out or saves
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def open_run(
    model: StageModel,
    dataset: Dataset,
    trainer: TrainerConfig,
    *,
    output: Path,
    config: dict[str, Any],
    seed: int,
    resume: bool,
    overwrite: bool,
    tracker: Mapping[str, Any] | None,
    collate: Collate | None,
) -> Run:
    """Check, prepare the output folder and the processes, and put model, optimizer and data in place.

    Raises:
        UserError: the output folder is taken, there is nothing to resume from, the batch cannot be divided,
            the data set is empty, the precision is not available, or the checkpoint does not fit.
    """
    check_output(output, resume=resume, overwrite=overwrite)
    goes_on = checkpoint.continues(output, resume)
    if len(dataset) == 0:
        raise UserError("data: no training samples; check the data folder and the filters set for it")
    trainer = trainer.for_samples(len(dataset))
    find_tracker(tracker)
    source = checkpoint.find_checkpoint(output, model.stage) if goes_on else None
    progress, rng = state.load_progress(source / "state") if source else (state.Progress(), [])

    accelerator = start_processes(trainer)
    torch.set_float32_matmul_precision(trainer.matmul)
    set_seed(seed, device_specific=True)
    feed = open_feed(dataset, trainer, accelerator, seed=seed, start=progress.samples, collate=collate)
    model.train().to(accelerator.device)
    snapshot = Snapshot(model, trainer.ema) if accelerator.is_main_process else None
    wrapped, ema, optimizer = distribute(model, trainer, accelerator)
    if source:
        restore(source, progress, model=model, ema=ema, optimizer=optimizer, scaler=accelerator.scaler)

    step, writer, lock, opened = progress.step, None, None, None
    data = {"size": len(dataset), "fingerprint": getattr(dataset, "fingerprint", None)}
    accelerator.wait_for_everyone()  # all have looked at the output folder
    if snapshot is not None:  # the main process
        prepare_output(output, resume=resume, overwrite=overwrite)
        lock, opened = claim_output(output, config), open_tracker(tracker, output, config)
        writer = CheckpointWriter(
            snapshot, output, config=config, data=data, keep=trainer.keep, best_metric=trainer.best_metric
        )
    accelerator.wait_for_everyone()
    run = Run(
        accelerator=accelerator,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        ema=ema,
        feed=feed,
        journal=Journal(accelerator, output, step, opened),
        display=ProgressDisplay(model.stage, trainer.max_steps, step, enabled=accelerator.is_main_process),
        writer=writer,
        lock=lock,
        trainer=trainer,
        output=output,
        config=config,
        data=data,
        sharded=sharding.asked_for() is not None,
        step=step,
        saved=step,
        elapsed=progress.elapsed_s,
        metrics=checkpoint.read_manifest(source)["metrics"] if source else {},
        best=checkpoint.best_score(output, trainer.best_metric),
        spikes=progress.spikes,
        left_out=progress.left_out,
    )
    summarise(run)
    if resume:
        report_resume(run, source, processes_then=len(rng))
    if accelerator.process_index < len(rng):
        state.set_rng_state(rng[accelerator.process_index])
    return run


def claim_output(output: Path, config: dict[str, Any]) -> TextIO | None:
    """Take the prepared folder for this run: its lock, which is returned, and its configuration in it."""
    lock = claim(output)
    write_file(output / checkpoint.RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))
    return lock


def distribute(
    model: StageModel, trainer: TrainerConfig, accelerator: Accelerator
) -> tuple[nn.Module, EMA | None, Optimizer]:
    """The model as every process is to call it, whole or cut as the launcher asked; averages; optimizer."""
    sharded = sharding.asked_for()
    if sharded == "fsdp":
        sharding.shard(model, processes=accelerator.num_processes, device=accelerator.device)
    ema = EMA(model, trainer.ema) if trainer.ema is not None else None
    # The mode of evaluation leaves out the wrapper of DDP.
    wrapped = accelerator.prepare_model(model, evaluation_mode=sharded is not None)
    optimizer = accelerator.prepare_optimizer(build_optimizer(model, trainer, accelerator))
    if sharded == "deepspeed":
        wrapped, optimizer = zero.shard(model, optimizer.optimizer, accelerator, clip=trainer.clip)
    return wrapped, ema, optimizer


def start_processes(trainer: TrainerConfig) -> Accelerator:
    """Join the processes that `accelerate launch` started, or be the only one.

    Raises:
        UserError: the precision is not available here, or the launcher was told to shard the model otherwise
            than `defi.engine.sharding` does.
    """
    sharded = sharding.asked_for()
    if sharded and trainer.precision == "fp16":
        raise UserError("trainer.precision=fp16: not for a sharded model; set trainer.precision=bf16")
    if sharded == "deepspeed":
        zero.check(trainer)
    # Newer torch has another name for this switch; accelerate's handler knows the old one alone.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    try:
        kind = zero.ZeroAccelerator if sharded == "deepspeed" else Accelerator
        with sharding.left_to_us():
            return kind(
                mixed_precision=trainer.precision,
                kwargs_handlers=[
                    DistributedDataParallelKwargs(broadcast_buffers=False),
                    InitProcessGroupKwargs(timeout=LONGEST_WAIT),
                ],
            )
    except ValueError as error:
        raise UserError(f"trainer.precision={trainer.precision}: {error}; set trainer.precision=no") from None


def build_optimizer(model: StageModel, trainer: TrainerConfig, accelerator: Accelerator) -> Optimizer:
    """AdamW over everything that is trained, norms and biases included, as the recipes have it."""
    return AdamW(
        [parameter for _, parameter in model.trainable()],
        lr=trainer.lr,
        betas=trainer.betas,
        weight_decay=trainer.weight_decay,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )


def open_feed(
    dataset: Dataset,
    trainer: TrainerConfig,
    accelerator: Accelerator,
    *,
    seed: int,
    start: int,
    collate: Collate | None,
) -> Feed:
    """The batches of this process from a position on."""
    micro, accumulation = trainer.split_batch(accelerator.num_processes)
    order = StepOrder(
        len(dataset),
        seed=seed,
        start=start,
        global_batch=trainer.global_batch,
        micro_batch=micro,
        process=(accelerator.process_index, accelerator.num_processes),
    )
    return Feed(
        dataset,
        order,
        accumulation=accumulation,
        passes=trainer.passes,
        workers=trainer.workers,
        bad_samples=trainer.bad_samples,
        device=accelerator.device,
        collate=collate,
    )


def restore(
    source: Path,
    progress: state.Progress,
    *,
    model: StageModel,
    ema: EMA | None,
    optimizer: Optimizer,
    scaler: GradScaler | None,
) -> None:
    """Put weights, averages, optimizer and loss scale where the checkpoint `source` left them."""
    has_averages = (source / "ema").is_dir()
    if ema is not None and has_averages:
        model.load_weights(source / "ema")
        ema.restart()
        ema.updates = progress.ema_updates
    model.load_weights(source)
    if ema is not None and not has_averages:
        ema.restart()
    state.load_optimizer(source / "state", optimizer, [name for name, _ in model.trainable()])
    if scaler is not None and progress.scaler is not None:
        scaler.load_state_dict(progress.scaler)


def report_resume(run: Run, source: Path | None, *, processes_then: int) -> None:
    """Say where the run continues, and everything that is not what the checkpoint was trained with."""
    if source is None:
        run.display.say("  resuming     nothing: it was stopped before its first checkpoint, and starts anew")
        return
    run.display.say(f"  resuming     after step {run.step}, from {source}")
    old, new = flatten(checkpoint.read_run_config(source)), flatten(run.config)
    for key in sorted(old.keys() | new.keys()):
        if key not in ("resume", "overwrite", "output") and old.get(key) != new.get(key):
            run.display.say(f"  changed      {key}: {old.get(key)} → {new.get(key)}")
    if checkpoint.read_manifest(source)["data"] != run.data:
        run.display.say("  changed      the training data: samples come in another order from here on")
    processes = run.accelerator.num_processes
    if processes != processes_then:
        run.display.say(
            f"  changed      processes: {processes_then} → {processes}; same samples, other dropout"
        )


def summarise(run: Run) -> None:
    """Print what is about to be trained, on what, and where it goes."""
    trained = sum(parameter.numel() for _, parameter in run.model.trainable())
    frozen = sum(parameter.numel() for parameter in run.model.parameters()) - trained
    processes = run.accelerator.num_processes
    micro, accumulation = run.trainer.split_batch(processes)
    split = f"{micro} × {processes} process(es) × {accumulation} accumulated"
    cut = f", sharded over {processes} processes" if run.sharded else ""
    fingerprint = f", fingerprint {run.data['fingerprint']}" if run.data["fingerprint"] else ""
    run.display.say(
        f"{run.model.stage}, preset {run.config.get('preset_name')}\n"
        f"  parameters   {trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen{cut}\n"
        f"  data         {run.data['size']:,} samples{fingerprint}\n"
        f"  batch        {run.trainer.global_batch} = {split}\n"
        f"  steps        {run.trainer.max_steps} ({run.trainer.schedule} rate, at most {run.trainer.lr:g})\n"
        f"  precision    {run.trainer.precision} on {run.accelerator.device.type}\n"
        f"  output       {run.output}"
    )
