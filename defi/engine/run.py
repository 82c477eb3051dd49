"""A run in progress: what the loop holds, and what it does with it between steps."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from defi.config import flatten
from defi.engine import checkpoint, faults
from defi.engine.checkpoint import CheckpointWriter, continues, find_checkpoint, rotate, save
from defi.engine.config import TrainerConfig
from defi.engine.data import Batch, Feed
from defi.engine.log import METRICS, TRACKERS, Journal, check_tracker
from defi.engine.model import StageModel
from defi.engine.optimizer import EMA, build_optimizer, optimizer_tensors
from defi.engine.output import check_output, claim, prepare_output, write_file
from defi.engine.state import Progress, TrainingState, preserved_rng, read_progress, rng_state, set_rng_state
from defi.errors import UserError
from defi.processes import join_training, sharding_requested

# Called with the model, the step and a folder for pictures or videos; returns numbers to log.
Inspect = Callable[[StageModel, int, Path], Mapping[str, float]]
FOLDERS = {"preview": "previews", "evaluate": "rollouts"}  # of what is inspected


class Run:
    """One training run. Everything is checked and loaded before anything is written.

    Args:
        config: the resolved configuration, stored with every checkpoint (`preset_name` names the preset).
        seed: of data order, sample seeds and dropout. The model's initial weights are the caller's.
        resume: continue from the newest checkpoint in `output`, exactly.
        overwrite: delete what `output` holds.
        tracker: the `tracker` section of the configuration.

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
        config: Mapping[str, Any],
        seed: int = 0,
        resume: bool = False,
        overwrite: bool = False,
        tracker: Mapping[str, Any] | None = None,
    ) -> None:
        check_output(output, resume=resume, overwrite=overwrite)
        source = find_checkpoint(output, model.stage) if continues(output, resume) else None
        if len(dataset) == 0:
            raise UserError("data: no training samples; check the data folder and the filters set for it")
        self.model, self.output, self.config = model, output, dict(config)
        self.trainer = trainer = trainer.for_samples(len(dataset))
        self.data = {"size": len(dataset), "fingerprint": getattr(dataset, "fingerprint", None)}
        self.accelerator = accelerator = join_training(trainer.precision, check_tracker(tracker), output)
        # Not before: trying the states of generators would start CUDA on the first GPU in every process.
        self.progress, rng = read_progress(source) if source else (Progress(), [])
        progress = self.progress

        self.main, device = accelerator.is_main_process, accelerator.device
        torch.set_float32_matmul_precision(trainer.matmul)
        set_seed(seed, device_specific=True)
        self.feed = Feed(dataset, trainer, accelerator, seed=seed, start=progress.samples)
        model.train().to(device)
        copy = model.copied_to("cpu") if self.main else None
        self.sharded = sharding_requested()
        if self.sharded:
            model.shard(device)
        ema = EMA(model, trainer.ema) if trainer.ema is not None else None
        # What the loop calls: DDP's wrapper, which evaluation mode leaves out.
        self.wrapped: nn.Module = accelerator.prepare_model(model, evaluation_mode=self.sharded)
        self.optimizer = build_optimizer(model, trainer, accelerator)
        self.state = TrainingState(model, ema, optimizer_tensors(self.optimizer, model), progress)
        if source:
            self.state.load(source, accelerator.scaler)
        self.writer = CheckpointWriter(self.state, copy, self._write)

        self.lock = None  # of the output folder, held until `close`
        accelerator.wait_for_everyone()  # all have looked at the output folder
        if self.main:
            prepare_output(output, resume=resume, overwrite=overwrite)
            self.lock = claim(output)
            write_file(output / checkpoint.RUN_CONFIG, OmegaConf.to_yaml(OmegaConf.create(self.config)))
        accelerator.wait_for_everyone()
        self.journal = Journal(accelerator, output, model.stage, trainer.max_steps or 0, done=self.step)
        self.journal.open_tracker(tracker, self.config)
        self.started = time.monotonic() - progress.elapsed_s
        self.saved = self.step  # step of the latest checkpoint
        scores = checkpoint.scores(output, trainer.best_metric)
        self.best, self.new_best = max(scores.values(), default=-math.inf), False
        # A trial of a sharded model that fails in one process would leave the others waiting for its shards.
        self.fits = self.sharded or device.type == "cpu"  # a micro-batch is known to fit the memory
        self.reported = 0  # replaced samples
        self._summarise(source, processes_then=len(rng))
        if accelerator.process_index < len(rng):
            set_rng_state(rng[accelerator.process_index])

    @property
    def step(self) -> int:
        """Steps taken so far, over all starts."""
        return self.progress.step

    def elapsed(self) -> float:
        """Seconds of training so far, over all starts."""
        return time.monotonic() - self.started

    def next_batches(self) -> list[Batch]:
        """The micro-batches of the next step, small enough for the memory; the global batch stays."""
        batches, asked = self.feed.next_step(), self.feed.micro_batch
        while not (self.fits or faults.micro_batch_fits(self.model, batches[0], self.accelerator)):
            if self.feed.micro_batch == 1:
                raise faults.Stopped("trainer.micro_batch=1: out of memory even so; choose a smaller preset")
            batches = self.feed.shrink(batches)
        self.fits = True
        self.state.mark()
        if (now := self.feed.micro_batch) < asked:
            text = f"out of memory with {asked} samples at a time: now {now}, {len(batches)} times per step"
            self.journal.say(f"{text}; the global batch stays {self.trainer.global_batch}")
        return batches

    def step_done(self, scalars: Mapping[str, Tensor], loss: float) -> None:
        """Take note of a step: averages, log, spikes, and the end of an epoch."""
        if self.state.ema is not None:
            self.state.ema.update()
        self.journal.add(scalars)
        self._advance()
        usual = self.progress.spikes.mean
        if self.progress.spikes.is_spike(loss):
            text = f"spike: loss {loss:.4g} at step {self.step}, usually {usual:.4g}; see {METRICS}"
            record = {"loss": loss, "usual": usual, "samples": self.feed.indices()}
            self.journal.write("spike", self.step, record, say=text)

    def leave_out(self, batches: list[Batch], error: FloatingPointError) -> None:
        """Report a step whose numbers are not finite, and continue without it if that is still allowed.

        Otherwise (`trainer.skip_nonfinite`) write a checkpoint from before the step and raise `Stopped`.
        """
        step, process, allowed = self.step + 1, self.accelerator.process_index, self.trainer.skip_nonfinite
        record = {"reason": str(error), "samples": self.feed.indices()}
        file = self.output / "nonfinite" / f"step_{step:08d}_process_{process}.json"
        what = f"{error} at step {step}, first in "
        what += faults.write_report(file, self.model, batches, {"step": step} | record)
        self.state.rewind()
        self.optimizer.zero_grad()
        if self.progress.left_out >= allowed:
            if self.saved != self.step:
                self.feed.samples -= self.trainer.global_batch  # a run that continues takes them again
                with suppress(UserError):  # another error is raised already
                    self.save()
            fix = "lower trainer.lr or trainer.clip, fix the data, or allow trainer.skip_nonfinite"
            raise faults.Stopped(f"{self.output}: {what}; {fix}")
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.progress.left_out += 1
        self._advance()
        count = f"{self.progress.left_out} of trainer.skip_nonfinite={allowed}"
        self.journal.write("left_out", self.step, record, say=f"left out: {what} ({count})")

    def _advance(self) -> None:
        """The step is over, taken or left out."""
        self.progress.step += 1
        self.new_best = False
        self.model.step_end()
        if self.writer.idle:
            self.writer.wait()  # raises its error
        if self.feed.ended_epoch:
            self.journal.write("epoch", self.step, {"epoch": int(self.feed.epochs), **self.model.epoch_end()})

    def log(self, rate: float) -> None:
        """Write and show the averages since the last time."""
        self._report_replaced()
        means, steps, seconds = self.journal.averages()
        if steps == 0:  # all since then were left out
            return
        speed, wait = steps * self.trainer.global_batch / seconds, min(self.feed.waited / seconds, 1.0)
        self.feed.waited = 0.0
        numbers = means | {"lr": rate, "samples_per_s": speed, "data_wait": wait}
        numbers |= {"epoch": self.feed.epochs, "elapsed_s": self.elapsed()}
        self.journal.write("train", self.step, numbers)
        text = f"loss {means['loss']:.4g}  {speed:.4g} samples/s  data wait {wait:.0%}"
        self.journal.show(self.step, text)

    def _report_replaced(self) -> None:
        """Write and show which samples were replaced since the last time, in any process."""
        if self.trainer.bad_samples == 0:
            return
        new, self.reported = self.feed.faults[self.reported :], len(self.feed.faults)
        for fault in gather_object(new):
            self.journal.write("bad_sample", self.step, {"reason": fault}, say=f"replaced: {fault}")

    def inspect(self, kind: str, function: Inspect) -> None:
        """Let `function` draw or roll out the averaged model in the main process; the others wait.

        Training is undisturbed. An evaluation without `trainer.best_metric` saves and stops the run.
        """
        numbers: dict[str, float] = {}
        with self.journal.paused():
            state: TrainingState | None = self.state
            if self.sharded:  # a copy is put together
                self.writer.wait()
                state = self.writer.copy
                self.state.copy_to(state, optimizer=False)
            if self.main:
                folder = self.output / FOLDERS[kind] / f"step_{self.step:08d}"
                folder.mkdir(parents=True, exist_ok=True)
                averages = state.ema.applied() if state.ema is not None else nullcontext()
                with preserved_rng(), torch.no_grad(), self.accelerator.autocast(), averages:
                    model = state.model.copied_to(self.accelerator.device) if self.sharded else self.model
                    numbers = dict(function(model.eval(), self.step, folder))
                    model.train()
                self.journal.write(kind, self.step, numbers)
            (numbers,) = broadcast_object_list([numbers])
        if kind == "preview":
            return
        self.progress.metrics, metric = numbers, self.trainer.best_metric
        if metric in numbers:
            self.new_best = numbers[metric] > self.best
            self.best = max(numbers[metric], self.best)
        elif metric is not None:
            self.save()
            fix = f"choose one that an evaluation reports: {', '.join(sorted(numbers))}"
            raise faults.Stopped(f"trainer.best_metric={metric}: {fix}")

    def save(self) -> None:
        """Begin to write a checkpoint of this step; `settle` waits for its end."""
        self._report_replaced()
        self.saved = self.step
        progress, scaler = self.progress, self.accelerator.scaler
        progress.samples, progress.elapsed_s = self.feed.samples, self.elapsed()
        progress.ema_updates = self.state.ema.updates if self.state.ema is not None else 0
        progress.scaler = scaler.state_dict() if scaler is not None else None
        self.state.rng = gather_object([rng_state()])
        with self.journal.paused():
            self.writer.save()

    def _write(self, state: TrainingState) -> None:  # in the checkpoint thread, of a copy
        step = state.progress.step
        save(state.model, self.output, step=step, config=self.config, data=self.data, state=state)
        rotate(self.output, self.trainer.keep, self.trainer.best_metric)

    def settle(self) -> None:
        """Return when the checkpoints are on the disk, in every process at the same time."""
        self.writer.wait()
        self.accelerator.wait_for_everyone()

    def _summarise(self, source: Path | None, processes_then: int) -> None:
        """Print what is trained, on what, where it goes, and what a resumed run does differently."""
        trained = sum(parameter.numel() for _, parameter in self.model.trainable())
        frozen = sum(parameter.numel() for parameter in self.model.parameters()) - trained
        trainer, processes = self.trainer, self.accelerator.num_processes
        micro, accumulation = trainer.split_batch(processes)
        sharded = f", sharded over {processes} processes" if self.sharded else ""
        batch = f"{micro} × {processes} process(es) × {accumulation} accumulated"
        rows = [
            ("parameters", f"{trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen{sharded}"),
            ("data", f"{self.data['size']:,} samples, fingerprint {self.data['fingerprint']}"),
            ("batch", f"{trainer.global_batch} = {batch}"),
            ("steps", f"{trainer.max_steps} ({trainer.schedule} rate, at most {trainer.lr:g})"),
            ("precision", f"{trainer.precision} on {self.accelerator.device.type}"),
            ("output", str(self.output)),
            ("starting", f"after step {self.step}, from {source}" if source else "anew"),
        ]
        if source:
            old, new = flatten(checkpoint.read_run_config(source)), flatten(self.config)
            keys = sorted((old.keys() | new.keys()) - {"resume", "overwrite", "output"})
            changes = [f"{k}: {old.get(k)} → {new.get(k)}" for k in keys if old.get(k) != new.get(k)]
            if checkpoint.read_manifest(source)["data"] != self.data:
                changes.append("the training data: samples come in another order from here on")
            if processes != processes_then:
                changes.append(f"processes: {processes_then} → {processes}; same samples, other dropout")
            rows += [("changed", change) for change in changes]
        self.journal.table(f"{self.model.stage}, preset {self.config.get('preset_name')}", rows)

    def finish(self) -> Path:
        """Say where everything is and return the last checkpoint."""
        self.settle()
        self.journal.close()
        final = find_checkpoint(self.output)
        rows = [
            ("checkpoint", f"{final} ({len(checkpoint.list_checkpoints(self.output))} kept)"),
            ("numbers", f"{self.output / METRICS} (python -m defi.engine.plot {self.output})"),
        ]
        places = [self.output / name for name in (*FOLDERS.values(), "nonfinite", *TRACKERS)]
        rows += [(place.name, f"{place}/") for place in places if place.is_dir()]
        took = timedelta(seconds=round(self.elapsed()))
        self.journal.table(f"done: step {self.step} after {took}", rows)
        return final

    def close(self) -> None:
        """Finish the checkpoint; release loader workers, files and the terminal."""
        try:
            self.writer.wait()
        except UserError as error:  # something else ends the run already; this is not to be lost
            self.journal.say(f"error: {error}")
        self.feed.close()
        self.journal.close()
        self.journal.close_tracker()
        if self.lock is not None:
            self.lock.close()
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
