"""A run in progress: everything the loop holds in its hands, and what it does with it between steps."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from defi.engine import checkpoint, state
from defi.engine.config import TrainerConfig
from defi.engine.data import Feed
from defi.engine.ema import EMA
from defi.engine.model import StageModel
from defi.engine.progress import ProgressDisplay
from defi.engine.tracking import METRICS, Journal


@dataclass
class Run:
    """One training run in progress. `step`, `metrics` and `elapsed` survive a resume."""

    accelerator: Accelerator
    model: StageModel
    wrapped: nn.Module  # the model as accelerate prepared it
    optimizer: Optimizer
    ema: EMA | None
    feed: Feed
    journal: Journal
    display: ProgressDisplay
    trainer: TrainerConfig
    output: Path
    config: dict[str, Any]
    data: dict[str, Any]  # size and fingerprint
    step: int = 0
    elapsed: float = 0.0  # seconds of training before this start
    metrics: dict[str, float] = field(default_factory=dict)  # of the latest evaluation
    best: float = -math.inf
    new_best: bool = False  # the evaluation of this step is the best so far
    started: float = field(default_factory=time.monotonic)

    def step_done(self, scalars: Mapping[str, Tensor]) -> None:
        """Take note of a step: averages, log, and the end of a pass over the data."""
        self.step += 1
        self.new_best = False
        if self.ema is not None:
            self.ema.update()
        self.journal.add(scalars)
        if self.feed.ended_epoch:
            self.journal.write("epoch", self.step, {"epoch": int(self.feed.epochs), **self.model.epoch_end()})

    def log(self, rate: float) -> None:
        """Write and show the averages since the last time."""
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
            if self.accelerator.is_main_process:
                folder = (
                    self.output / ("samples" if kind == "sample" else "rollouts") / f"step_{self.step:08d}"
                )
                folder.mkdir(parents=True, exist_ok=True)
                with self.inspected():
                    numbers = dict(look(self.model, self.step, folder))
                self.journal.write(kind, self.step, numbers)
            if self.accelerator.num_processes > 1:
                numbers = broadcast_object_list([numbers])[0]
        if kind == "evaluate":
            self.metrics = numbers
            score = (
                numbers.get(self.trainer.best_metric, -math.inf) if self.trainer.best_metric else -math.inf
            )
            self.new_best = score > self.best
            self.best = max(score, self.best)

    @contextmanager
    def inspected(self) -> Iterator[None]:
        """The model as users will see it: averaged weights, eval mode, no gradients; training undisturbed."""
        if self.ema is not None:
            self.ema.swap()
        self.model.eval()
        try:
            with state.preserved_rng(), torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            self.model.train()
            if self.ema is not None:
                self.ema.swap()

    def save(self) -> None:
        """Write a checkpoint and delete the ones that are no longer kept."""
        rng = state.rng_state()
        rng = gather_object([rng]) if self.accelerator.num_processes > 1 else [rng]
        with self.journal.paused():
            if self.accelerator.is_main_process:
                checkpoint.save(
                    self.model, self.output, step=self.step, config=self.config, data=self.data,
                    metrics=self.metrics, ema=self.ema, state=lambda folder: self._save_state(folder, rng),
                )  # fmt: skip
                checkpoint.rotate(self.output, self.trainer.keep, self.trainer.best_metric)
            self.accelerator.wait_for_everyone()

    def _save_state(self, folder: Path, rng: list[dict[str, Any]]) -> None:
        scaler = self.accelerator.scaler
        state.save_optimizer(folder, self.optimizer, [name for name, _ in self.model.trainable()])
        progress = {
            "step": self.step,
            "samples": self.feed.samples,
            "seed": self.feed.order.seed,
            "elapsed_s": self.elapsed_now(),
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            "best": self.best,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        state.save_progress(folder, progress, rng)

    def elapsed_now(self) -> float:
        """Seconds of training so far, over all starts."""
        return self.elapsed + time.monotonic() - self.started

    def way_back(self) -> str:
        """What to do after numbers went wrong."""
        saved = checkpoint.list_checkpoints(self.output)
        advice = "lower trainer.lr or trainer.clip, or look at the data"
        return f"{advice}; {saved[-1]} is intact, resume=true continues from it" if saved else advice

    def finish(self) -> Path:
        """Say where everything is and return the last checkpoint."""
        final = checkpoint.find_checkpoint(self.output)
        spent = timedelta(seconds=round(self.elapsed_now()))
        self.display.close()
        self.display.say(
            f"done: step {self.step} after {spent}\n"
            f"  checkpoint   {final}\n"
            f"  numbers      {self.output / METRICS} (python -m defi.engine.plot {self.output})"
        )
        return final

    def close(self) -> None:
        """Let go of loader workers, files and the terminal."""
        self.display.close()
        self.feed.close()
        self.journal.close()
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
