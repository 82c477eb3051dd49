"""A run in progress: what the loop holds, and what it does with it between steps."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from defi.config import flatten
from defi.engine import checkpoint, faults
from defi.engine.config import TrainerConfig
from defi.engine.data import Feed, split
from defi.engine.distributed import shard, sharding_requested, start_processes
from defi.engine.ema import EMA
from defi.engine.log import METRICS, TRACKERS, Journal, ProgressDisplay, check_tracker
from defi.engine.model import StageModel
from defi.engine.optimizer import build_optimizer
from defi.engine.output import check_output, claim, prepare_output, write_file
from defi.engine.resume import Progress, preserved_rng, read_progress, rng_state, set_rng_state
from defi.errors import UserError

# Called with the model, the step and a folder for pictures or videos; returns numbers to log.
Inspect = Callable[[StageModel, int, Path], Mapping[str, float]]


class Run:
    """One training run. Everything is checked and loaded before anything is written.

    Raises:
        UserError: the output folder is taken, there is nothing to resume from, the batch cannot be divided,
            the data set is empty, the precision is not available, or the checkpoint does not fit.
    """

    def __init__(
        self,
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
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None,
    ) -> None:
        check_output(output, resume=resume, overwrite=overwrite)
        goes_on = checkpoint.continues(output, resume)
        source = checkpoint.find_checkpoint(output, model.stage) if goes_on else None
        if len(dataset) == 0:
            raise UserError("data: no training samples; check the data folder and the filters set for it")
        trainer = trainer.for_samples(len(dataset))
        self.model, self.trainer, self.output, self.config = model, trainer, output, config
        self.data = {"size": len(dataset), "fingerprint": getattr(dataset, "fingerprint", None)}
        self.progress, rng = read_progress(source / "state") if source else (Progress(), [])
        self.sharded = sharding_requested()

        self.accelerator = start_processes(trainer, check_tracker(tracker), output)
        self.main, device = self.accelerator.is_main_process, self.accelerator.device
        torch.set_float32_matmul_precision(trainer.matmul)
        set_seed(seed, device_specific=True)
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        self.feed = Feed(
            dataset, trainer, seed=seed, start=self.progress.samples, process=process, device=device,
            collate=collate,
        )  # fmt: skip
        model.train().to(device)
        self.writer = checkpoint.CheckpointWriter(
            model, trainer, output, config=config, data=self.data, main=self.main
        )
        if self.sharded:
            shard(model, model.unfrozen_blocks(), model.frozen_parameters(), device)
        self.ema = EMA(model, trainer.ema) if trainer.ema is not None else None
        # What the loop calls: DDP's wrapper, which evaluation mode leaves out.
        self.wrapped: nn.Module = self.accelerator.prepare_model(model, evaluation_mode=self.sharded)
        self.optimizer = build_optimizer(model, trainer, self.accelerator)
        if source:
            scaler = self.accelerator.scaler
            checkpoint.restore(source, self.progress, model, self.ema, self.optimizer, scaler)

        self.lock = None  # of the output folder, held until `close`
        self.accelerator.wait_for_everyone()  # all have looked at the output folder
        if self.main:
            prepare_output(output, resume=resume, overwrite=overwrite)
            self.lock = claim(output)
            write_file(output / checkpoint.RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))
        self.accelerator.wait_for_everyone()
        self.journal = Journal(self.accelerator, output, self.step)
        self.journal.open_tracker(tracker, config)
        self.display = ProgressDisplay(model.stage, trainer.max_steps, self.step, enabled=self.main)

        self.started = time.monotonic()
        self.saved = self.step  # step of the latest checkpoint
        # Numbers of the latest evaluation.
        self.metrics = checkpoint.read_manifest(source)["metrics"] if source else {}
        self.best = checkpoint.best_score(output, trainer.best_metric)
        self.new_best = False  # the evaluation of this step is the best so far
        # A trial of a sharded model that fails in one process would leave the others waiting for its shards.
        self.fits = self.sharded or device.type == "cpu"  # a micro-batch is known to fit the memory
        self.reported = 0  # replaced samples
        self._summarise(source, resume=resume, processes_then=len(rng))
        if process[0] < len(rng):
            set_rng_state(rng[process[0]])

    @property
    def step(self) -> int:
        """Steps taken so far, over all starts."""
        return self.progress.step

    # ---------------------------------------------------------------- a step

    def next_batches(self) -> list[dict[str, Any]]:
        """The micro-batches of the next step, small enough for the memory."""
        batches = self.feed.next_step()
        if not self.fits:
            batches = self.fit(batches)
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.rng_before = rng_state()
        return batches

    @cached_property
    def buffers(self) -> list[Tensor]:
        """What training changes besides parameters, already in the forward pass."""
        return [t for t in self.model.moving().values() if not isinstance(t, nn.Parameter)]

    def fit(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches in parts small enough for the memory; the global batch stays."""
        asked = self.feed.micro_batch
        while not faults.micro_batch_fits(self.model, batches[0], self.accelerator):
            before = self.feed.micro_batch
            if before == 1:
                raise UserError(
                    "trainer.micro_batch=1: out of memory with a single sample; choose a smaller preset, "
                    "trainer.precision=bf16, or a larger GPU"
                )
            self.feed.shrink()
            batches = [part for batch in batches for part in split(batch, before // self.feed.micro_batch)]
        self.fits = True
        if self.feed.micro_batch < asked:
            self.display.say(
                f"  batch        out of memory with {asked} samples at a time: now {self.feed.micro_batch}, "
                f"{len(batches)} times per step; the global batch stays {self.trainer.global_batch}"
            )
        return batches

    def step_done(self, scalars: Mapping[str, Tensor], loss: float) -> None:
        """Take note of a step: averages, log, spikes, and the end of an epoch."""
        if self.ema is not None:
            self.ema.update()
        self.journal.add(scalars)
        self._advance()
        usual = self.progress.spikes.mean
        if self.progress.spikes.is_spike(loss):
            samples = self.feed.indices()
            self.journal.write("spike", self.step, {"loss": loss, "usual": usual, "samples": samples})
            self.display.say(
                f"spike: loss {loss:.4g} at step {self.step}, usually {usual:.4g}; its samples are in "
                f"{self.output / METRICS}"
            )

    def leave_out(self, batches: list[dict[str, Any]], error: FloatingPointError) -> None:
        """Report a step whose numbers are not finite, and go on without it if that is still allowed.

        Raises:
            UserError: more such steps than `trainer.skip_nonfinite`; a checkpoint from before it was written.
        """
        report = faults.write_report(
            self.output / "nonfinite", self.model, batches, step=self.step + 1, reason=str(error),
            process=self.accelerator.process_index, samples=self.feed.indices(),
        )  # fmt: skip
        what, allowed = f"{error} at step {self.step + 1}, first in {report}", self.trainer.skip_nonfinite
        for buffer, before in zip(self.buffers, self.buffers_before):
            buffer.copy_(before)
        self.optimizer.zero_grad()
        if self.progress.left_out >= allowed:
            if self.saved != self.step:
                self.feed.put_back()
                set_rng_state(self.rng_before)
                with suppress(UserError):  # another error is raised already
                    self.save()
            raise UserError(
                f"{self.output}: {what}; lower trainer.lr or trainer.clip, fix the data, or allow "
                f"trainer.skip_nonfinite, {self.how_to_continue()}"
            )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.progress.left_out += 1
        self._advance()
        self.display.say(f"left out: {what} ({self.progress.left_out} of trainer.skip_nonfinite={allowed})")
        self.journal.write("left_out", self.step, {"reason": str(error), "samples": self.feed.indices()})

    def _advance(self) -> None:
        """The step is over, taken or left out."""
        self.progress.step += 1
        self.new_best = False
        self.model.step_end()
        self.writer.check()
        if self.feed.ended_epoch:
            self.journal.write("epoch", self.step, {"epoch": int(self.feed.epochs), **self.model.epoch_end()})

    # ---------------------------------------------------------------- what is due now and then

    def log(self, rate: float) -> None:
        """Write and show the averages since the last time."""
        self._report_replaced()
        means, steps, seconds = self.journal.averages()
        if steps == 0:  # all since then were left out
            return
        speed, wait = steps * self.trainer.global_batch / seconds, min(self.feed.waited / seconds, 1.0)
        self.feed.waited = 0.0
        position = {"epoch": self.feed.epochs, "elapsed_s": self.elapsed()}
        numbers = means | {"lr": rate, "samples_per_s": speed, "data_wait": wait} | position
        self.journal.write("train", self.step, numbers)
        self.display.show(self.step, f"loss {means['loss']:.4g}  {speed:.4g} samples/s  data wait {wait:.0%}")

    def _report_replaced(self) -> None:
        """Write and show which samples were replaced since the last time, in any process."""
        if self.trainer.bad_samples == 0:
            return
        new, self.reported = self.feed.faults[self.reported :], len(self.feed.faults)
        for fault in gather_object(new):
            self.journal.write("bad_sample", self.step, {"reason": fault})
            self.display.say(f"replaced: {fault}")

    def inspect(self, kind: str, function: Inspect) -> None:
        """Let `function` sample from or roll out the averaged model in the main process; the others wait."""
        numbers: dict[str, float] = {}
        with self.journal.paused():
            if self.sharded:
                self.writer.copy(checkpoint.training_tensors(self.model, self.ema))
            if self.main:
                place = "samples" if kind == "sample" else "rollouts"
                folder = self.output / place / f"step_{self.step:08d}"
                folder.mkdir(parents=True, exist_ok=True)
                with self._averaged_model() as model:
                    numbers = dict(function(model, self.step, folder))
                self.journal.write(kind, self.step, numbers)
            (numbers,) = broadcast_object_list([numbers])
        if kind == "evaluate":
            self.metrics = numbers
            self._compare(numbers)

    def _compare(self, numbers: Mapping[str, float]) -> None:
        """Note whether an evaluation is the best so far.

        Raises:
            UserError: it has no `trainer.best_metric`; a checkpoint of this step was written.
        """
        metric = self.trainer.best_metric
        if metric is None:
            return
        if metric not in numbers:
            self.save()
            raise UserError(
                f"trainer.best_metric={metric}: an evaluation reports {', '.join(sorted(numbers))}; choose "
                f"one of these, {self.how_to_continue()}"
            )
        self.new_best = numbers[metric] > self.best
        self.best = max(numbers[metric], self.best)

    @contextmanager
    def _averaged_model(self) -> Iterator[StageModel]:
        """Averaged weights, eval mode, no gradients; training undisturbed. Of a sharded model, the copy."""
        holder = self.writer if self.sharded else self
        model, device = holder.model.eval(), self.accelerator.device
        try:
            with (
                preserved_rng(),
                torch.no_grad(),
                self.accelerator.autocast(),
                holder.ema.applied() if holder.ema is not None else nullcontext(),
                model.moved_to(device) if self.sharded else nullcontext(),
            ):
                yield model
        finally:
            model.train()

    # ---------------------------------------------------------------- checkpoints and the end

    def save(self) -> None:
        """Begin to write a checkpoint of this step; `settle` waits for its end."""
        self._report_replaced()
        self.saved = self.step
        scaler = self.accelerator.scaler
        progress = replace(
            self.progress,
            samples=self.feed.samples,
            elapsed_s=self.elapsed(),
            ema_updates=self.ema.updates if self.ema is not None else 0,
            scaler=scaler.state_dict() if scaler is not None else None,
        )
        rng = gather_object([rng_state()])
        tensors = checkpoint.training_tensors(self.model, self.ema, self.optimizer)
        with self.journal.paused():
            self.writer.save(tensors, progress, rng, self.metrics)

    def settle(self) -> None:
        """Return when the checkpoints are on the disk, in every process at the same time."""
        self.writer.wait()
        self.accelerator.wait_for_everyone()

    def elapsed(self) -> float:
        """Seconds of training so far, over all starts."""
        return self.progress.elapsed_s + time.monotonic() - self.started

    def how_to_continue(self) -> str:
        """What to do after this run has failed."""
        with suppress(UserError):  # another error is raised already
            self.writer.wait()
        return checkpoint.how_to_continue(self.output)

    def _summarise(self, source: Path | None, *, resume: bool, processes_then: int) -> None:
        """Print what is trained, on what, where it goes, and what a resumed run does differently."""
        trained = sum(parameter.numel() for _, parameter in self.model.trainable())
        frozen = sum(parameter.numel() for parameter in self.model.parameters()) - trained
        trainer, processes = self.trainer, self.accelerator.num_processes
        micro, accumulation = trainer.split_batch(processes)
        sharded = f", sharded over {processes} processes" if self.sharded else ""
        fingerprint = f", fingerprint {self.data['fingerprint']}" if self.data["fingerprint"] else ""
        self.display.say(
            f"{self.model.stage}, preset {self.config.get('preset_name')}\n"
            f"  parameters   {trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen{sharded}\n"
            f"  data         {self.data['size']:,} samples{fingerprint}\n"
            f"  batch        {trainer.global_batch} = {micro} × {processes} process(es) × {accumulation} "
            "accumulated\n"
            f"  steps        {trainer.max_steps} ({trainer.schedule} rate, at most {trainer.lr:g})\n"
            f"  precision    {trainer.precision} on {self.accelerator.device.type}\n"
            f"  output       {self.output}"
        )
        if source is not None:
            self.display.say(f"  resuming     after step {self.step}, from {source}")
            for change in self._changes(source, processes_then):
                self.display.say(f"  changed      {change}")
        elif resume:
            self.display.say("  resuming     nothing: stopped before its first checkpoint, it starts anew")

    def _changes(self, source: Path, processes_then: int) -> list[str]:
        """Everything that is not what the checkpoint `source` was trained with."""
        old, new = flatten(checkpoint.read_run_config(source)), flatten(self.config)
        changes = [
            f"{key}: {old.get(key)} → {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if key not in ("resume", "overwrite", "output") and old.get(key) != new.get(key)
        ]
        if checkpoint.read_manifest(source)["data"] != self.data:
            changes.append("the training data: samples come in another order from here on")
        processes = self.accelerator.num_processes
        if processes != processes_then:
            changes.append(f"processes: {processes_then} → {processes}; same samples, other dropout")
        return changes

    def finish(self) -> Path:
        """Say where everything is and return the last checkpoint."""
        self.settle()
        final, kept = checkpoint.find_checkpoint(self.output), checkpoint.list_checkpoints(self.output)
        self.display.close()
        places = {
            "checkpoint": f"{final} ({len(kept)} kept)",
            "numbers": f"{self.output / METRICS} (python -m defi.engine.plot {self.output})",
            **{
                name: f"{self.output / name}/"
                for name in ("samples", "rollouts", "nonfinite", *TRACKERS)
                if (self.output / name).is_dir()
            },
        }
        self.display.say(f"done: step {self.step} after {timedelta(seconds=round(self.elapsed()))}")
        for name, place in places.items():
            self.display.say(f"  {name:<12} {place}")
        return final

    def close(self) -> None:
        """Release the checkpoint thread, loader workers, files and the terminal."""
        self.display.close()
        try:
            self.writer.close()
        except UserError as error:  # something else ends the run already; this is not to be lost
            self.display.say(f"error: {error}")
        self.feed.close()
        self.journal.close()
        if self.lock is not None:
            self.lock.close()
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
