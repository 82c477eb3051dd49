"""A run in progress: everything the loop holds in its hands, and what it does with it between steps."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from defi.engine import checkpoint, memory, sharding, state, trouble
from defi.engine.config import TrainerConfig
from defi.engine.data import Feed, split
from defi.engine.ema import EMA
from defi.engine.model import StageModel
from defi.engine.progress import ProgressDisplay
from defi.engine.spikes import SpikeWatch
from defi.engine.tracking import METRICS, TRACKERS, Journal
from defi.engine.writer import CheckpointWriter, moving_tensors
from defi.errors import UserError
from defi.files import one_line

# As the loader says it, or `Feed`; an error within a worker comes as what it is, and says "Caught …" first.
DEAD_WORKER = re.compile(r"DataLoader worker( \(pid|:)")


def lost_another_process(error: RuntimeError) -> str | None:
    """What to say where an error means that another process of the run is gone."""
    if isinstance(error, dist.DistError) or "by peer" in str(error):  # the latter is gloo's
        return f"lost another process of this run ({one_line(error)}); if it failed, its message says why"
    return None


@dataclass
class Run:
    """One training run in progress. What `_progress` notes survives a resume."""

    accelerator: Accelerator
    model: StageModel
    wrapped: nn.Module  # the model as accelerate prepared it
    optimizer: Optimizer
    ema: EMA | None
    feed: Feed
    journal: Journal
    display: ProgressDisplay
    writer: CheckpointWriter | None  # only in the main process
    lock: TextIO | None  # of the output folder, held until `close`
    trainer: TrainerConfig
    output: Path
    config: dict[str, Any]
    data: dict[str, Any]  # size and fingerprint
    sharded: bool = False  # the model is cut over the processes
    step: int = 0
    elapsed: float = 0.0  # seconds of training before this start
    metrics: dict[str, float] = field(default_factory=dict)  # of the latest evaluation
    best: float = -math.inf
    new_best: bool = False  # the evaluation of this step is the best so far
    spikes: SpikeWatch = field(default_factory=SpikeWatch)
    left_out: int = 0  # steps whose numbers were not finite
    before: list[Tensor] = field(default_factory=list)  # what the buffers held before the present step
    drawn: list[Tensor] = field(default_factory=list)  # the random generators before it
    saved: int = 0  # step of the latest checkpoint
    fitted: bool = False  # a micro-batch is known to fit the memory
    faults_told: int = 0
    started: float = field(default_factory=time.monotonic)

    def next_batches(self) -> list[dict[str, Any]]:
        """The micro-batches of the next step, small enough for the memory."""
        batches = self.feed.next_step()
        # A trial of a sharded model that fails in one process would leave the others waiting for its shards.
        if not (self.fitted or self.sharded or self.accelerator.device.type == "cpu"):
            batches = self.fit(batches)
        self.before = [buffer.clone() for buffer in self.buffers]
        self.drawn = state.torch_rng_state()
        return batches

    @cached_property
    def buffers(self) -> list[Tensor]:
        """What training changes besides parameters, already in the forward pass."""
        return [t for t in self.model.moving().values() if not isinstance(t, nn.Parameter)]

    def fit(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches in as many parts as it takes to have room for one; the global batch stays."""
        asked = self.feed.micro_batch
        while not memory.fits(self.model, batches[0], self.optimizer, self.accelerator):
            if self.feed.micro_batch == 1:
                raise UserError(
                    "trainer.micro_batch=1: out of memory with a single sample; choose a smaller preset, "
                    "trainer.precision=bf16, or a larger GPU"
                )
            before = self.feed.micro_batch
            self.feed.shrink()
            parts = before // self.feed.micro_batch
            batches = [part for batch in batches for part in split(batch, parts)]
        self.fitted = True
        if self.feed.micro_batch < asked:
            self.display.say(
                f"  batch        out of memory with {asked} samples at a time: now {self.feed.micro_batch}, "
                f"{len(batches)} times per step; the global batch stays {self.trainer.global_batch}"
            )
        return batches

    def step_done(self, scalars: Mapping[str, Tensor], loss: float) -> None:
        """Take note of a step: averages, log, spikes, and the end of a pass over the data."""
        if self.ema is not None:
            self.ema.update()
        self.journal.add(scalars)
        self._advance()
        usual = self.spikes.mean
        if self.spikes.sees(loss):
            spike = {"loss": loss, "usual": usual, "samples": self.feed.indices()}
            self.journal.write("spike", self.step, spike)
            told = f"spike: loss {loss:.4g} at step {self.step}, usually {usual:.4g}"
            self.display.say(f"{told}; its samples are in {self.output / METRICS}")

    def leave_out(self, batches: list[dict[str, Any]], error: FloatingPointError) -> None:
        """Write down a step whose numbers are not finite, and go on without it if that is still allowed.

        Raises:
            UserError: more such steps than `trainer.skip_nonfinite`; a checkpoint from before it was written.
        """
        what = f"{error} at step {self.step + 1}, first in {self._report(batches, str(error))}"
        for buffer, before in zip(self.buffers, self.before):
            buffer.copy_(before)
        self.optimizer.zero_grad()
        if self.left_out >= self.trainer.skip_nonfinite:
            if self.saved != self.step:
                self.feed.put_back()
                state.set_torch_rng_state(self.drawn)
                with suppress(UserError):  # another error is being told
                    self.save()
            raise UserError(
                f"{self.output}: {what}; lower trainer.lr or trainer.clip, mend the data, or allow "
                f"trainer.skip_nonfinite, {self.way_back()}"
            )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.left_out += 1
        self._advance()
        self.display.say(
            f"left out: {what} ({self.left_out} of trainer.skip_nonfinite={self.trainer.skip_nonfinite})"
        )
        self.journal.write("left_out", self.step, {"reason": str(error), "samples": self.feed.indices()})

    def _report(self, batches: list[dict[str, Any]], reason: str) -> str:
        """Write down the batches of the step that went wrong; says where it began and where that stands."""
        origin = trouble.find_origin(self.model, batches)
        try:
            file = trouble.write_report(
                self.output / "nonfinite",
                batches,
                step=self.step + 1,
                process=self.accelerator.process_index,
                reason=reason,
                samples=self.feed.indices(),
                origin=origin,
            )
        except OSError as fault:
            return f"{origin}; its batch could not be written ({fault.strerror})"
        return f"{origin}; its batch is in {file}"

    def _advance(self) -> None:
        """The step is over, whatever became of it."""
        self.step += 1
        self.new_best = False
        self.model.step_end()
        if self.writer is not None:
            self.writer.check()
        if self.feed.ended_epoch:
            self.journal.write("epoch", self.step, {"epoch": int(self.feed.epochs), **self.model.epoch_end()})

    def tell_faults(self) -> None:
        """Write and show which samples were replaced since the last time, in any process."""
        if self.trainer.bad_samples == 0:
            return
        new, self.faults_told = self.feed.faults[self.faults_told :], len(self.feed.faults)
        for fault in gather_object(new) if self.accelerator.num_processes > 1 else new:
            self.journal.write("bad_sample", self.step, {"reason": fault})
            self.display.say(f"replaced: {fault}")

    def log(self, rate: float) -> None:
        """Write and show the averages since the last time."""
        self.tell_faults()
        if self.journal.empty:  # all steps since then were left out
            return
        means, steps, seconds = self.journal.averages()
        numbers = means | {
            "lr": rate,
            "epoch": self.feed.epochs,
            "samples_per_s": steps * self.trainer.global_batch / seconds,
            "data_wait": min(self.feed.waited / seconds, 1.0),
            "elapsed_s": self.elapsed_now(),
        }
        self.feed.waited = 0.0
        self.journal.write("train", self.step, numbers)
        self.display.update(self.step, numbers)

    def inspect(self, kind: str, look: Callable[[StageModel, int, Path], Mapping[str, float]]) -> None:
        """Let `look` sample from or roll out the averaged model in the main process; the others wait."""
        numbers: dict[str, float] = {}
        with self.journal.paused():
            if self.sharded:
                self._copy_whole()
            if self.writer is not None:
                folder = (
                    self.output / ("samples" if kind == "sample" else "rollouts") / f"step_{self.step:08d}"
                )
                folder.mkdir(parents=True, exist_ok=True)
                with self.inspected() as model:
                    numbers = dict(look(model, self.step, folder))
                self.journal.write(kind, self.step, numbers)
            if self.accelerator.num_processes > 1:
                numbers = broadcast_object_list([numbers])[0]
        if kind == "evaluate":
            self.metrics = numbers
            self._judge(numbers)

    def _judge(self, numbers: Mapping[str, float]) -> None:
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
                f"one of these, {self.way_back()}"
            )
        self.new_best = numbers[metric] > self.best
        self.best = max(numbers[metric], self.best)

    def _copy_whole(self) -> None:
        """Put the sharded model together in the main process' snapshot; a shard alone computes nothing."""
        tensors = moving_tensors(self.model, self.ema, None)
        if self.writer is not None:
            self.writer.copy(tensors)
        else:
            for tensor in tensors.values():  # take part while the main process asks for them
                sharding.full_tensor(tensor)

    @contextmanager
    def inspected(self) -> Iterator[StageModel]:
        """The model as users will see it: averaged weights, eval mode, no gradients; training undisturbed."""
        place = self.writer.snapshot if self.sharded else self
        if place.ema is not None:
            place.ema.swap()
        place.model.eval()
        try:
            with (
                state.preserved_rng(),
                torch.no_grad(),
                self.accelerator.autocast(),
                place.on(self.accelerator.device) if self.sharded else nullcontext(),
            ):
                yield place.model
        finally:
            place.model.train()
            if place.ema is not None:
                place.ema.swap()

    def save(self) -> None:
        """Begin to write a checkpoint of this step; `settle` waits for its end."""
        self.tell_faults()
        self.saved = self.step
        rng = state.rng_state()
        rng = gather_object([rng]) if self.accelerator.num_processes > 1 else [rng]
        tensors = moving_tensors(self.model, self.ema, self.optimizer)
        with self.journal.paused():
            if self.writer is not None:
                self.writer.save(
                    step=self.step, metrics=self.metrics, tensors=tensors, progress=self._progress(), rng=rng
                )
            else:
                for tensor in tensors.values():  # take part while the main process asks for them
                    sharding.full_tensor(tensor)

    def settle(self) -> None:
        """Return when the checkpoints are on the disk, in every process at the same time."""
        if self.writer is not None:
            self.writer.wait()
        self.accelerator.wait_for_everyone()

    def _progress(self) -> state.Progress:
        scaler = self.accelerator.scaler
        return state.Progress(
            step=self.step,
            samples=self.feed.samples,
            elapsed_s=self.elapsed_now(),
            ema_updates=self.ema.updates if self.ema is not None else 0,
            left_out=self.left_out,
            spikes=self.spikes,
            scaler=scaler.state_dict() if scaler is not None else None,
        )

    def elapsed_now(self) -> float:
        """Seconds of training so far, over all starts."""
        return self.elapsed + time.monotonic() - self.started

    def way_back(self) -> str:
        """What a person can do to go on."""
        if self.writer is not None:
            with suppress(UserError):  # another error is being told
                self.writer.wait()
        saved = checkpoint.list_checkpoints(self.output)
        return f"then continue from {saved[-1].name} with resume=true" if saved else "then start again"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Faults of disk, memory, loader workers and other processes as one line that says what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"trainer.micro_batch={self.feed.micro_batch}: out of memory at step {self.step + 1}; "
                f"lower it (the global batch stays), {self.way_back()}"
            ) from error
        except OSError as error:
            raise UserError(
                f"{error.filename or self.output}: {error.strerror or one_line(error)}; mend that, "
                f"{self.way_back()}"
            ) from error
        except RuntimeError as error:
            if lost := lost_another_process(error):
                raise UserError(f"{self.output}: {lost}; {self.way_back()}") from error
            if not DEAD_WORKER.match(str(error)):
                raise
            raise UserError(
                f"trainer.workers={self.trainer.workers}: a loader worker died ({one_line(error)}), "
                f"often for want of memory; lower trainer.workers, {self.way_back()}"
            ) from error

    def finish(self) -> Path:
        """Say where everything is and return the last checkpoint."""
        self.settle()
        final = checkpoint.find_checkpoint(self.output)
        spent = timedelta(seconds=round(self.elapsed_now()))
        self.display.close()
        places = {
            "checkpoint": f"{final} ({len(checkpoint.list_checkpoints(self.output))} kept)",
            "numbers": f"{self.output / METRICS} (python -m defi.engine.plot {self.output})",
            **{
                name: f"{self.output / name}/"
                for name in ("samples", "rollouts", "nonfinite", *TRACKERS)
                if (self.output / name).is_dir()
            },
        }
        lines = "".join(f"\n  {name:<12} {place}" for name, place in places.items())
        self.display.say(f"done: step {self.step} after {spent}{lines}")
        return final

    def close(self) -> None:
        """Let go of the checkpoint thread, loader workers, files and the terminal."""
        self.display.close()
        if self.writer is not None:
            try:
                self.writer.close()
            except UserError as error:  # something else ends the run already; this is not to be lost
                self.display.say(f"error: {error}")
        self.feed.close()
        self.journal.close()
        if self.lock is not None:
            self.lock.close()
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
