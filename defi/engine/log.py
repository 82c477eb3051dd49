"""The numbers of a run: `metrics.jsonl` always, a tracker where configured, and the terminal."""

import importlib.util
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from defi.engine.output import write_file
from defi.errors import UserError, one_line, reading

METRICS = "metrics.jsonl"
TRACKERS = ("wandb", "tensorboard")
SECONDS_BETWEEN_LINES = 15.0


def check_tracker(section: Mapping[str, Any] | None) -> str | None:
    """The name in the `tracker` section of a configuration, of an installed package; None for no tracker."""
    name = section["name"] if section else "none"
    if name == "none":
        return None
    if name not in TRACKERS:
        raise UserError(f"tracker.name={name}: choose none, {' or '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise UserError(f"tracker={name}: the package {name} is missing; pip install {name}, or tracker=none")
    return name


class ProgressDisplay:
    """A bar on a terminal, a line now and then in a log file or pipe; silent where `enabled` is false."""

    def __init__(self, title: str, total: int, done: int, *, enabled: bool) -> None:
        self.title, self.total, self.enabled = title, total, enabled
        self.console = Console(highlight=False, soft_wrap=True)
        self._started, self._first, self._last_line = time.monotonic(), done, 0.0
        self._bar = Progress(
            "{task.description}", BarColumn(bar_width=12), MofNCompleteColumn(), "{task.fields[numbers]}",
            TimeRemainingColumn(), console=self.console, refresh_per_second=2,
            disable=not (enabled and self.console.is_terminal),
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, completed=done, numbers="")
        self._bar.start()

    def show(self, step: int, text: str) -> None:
        """Move the bar to `step`, with `text` beside it."""
        self._bar.update(self._task, completed=step, numbers=text)
        overdue = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        if self._bar.disable and (overdue or step == self.total):
            self._last_line = now = time.monotonic()
            left = (now - self._started) / max(step - self._first, 1) * (self.total - step)
            self.say(f"{self.title} {step}/{self.total}  {text}  {timedelta(seconds=round(left))} left")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.enabled:
            self.console.print(text, markup=False)

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Print named facts under a title."""
        self.say("\n".join([title, *(f"  {name:<12} {text}" for name, text in rows)]))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()


class Journal(ProgressDisplay):
    """Averages what the steps report and writes it, one JSON object per line, on the main process.

    Scalars are summed where they are computed and read only when a line is written: a step never waits for
    the device because of its log. Trackers are the accelerator's; one that fails is dropped with a warning.
    """

    def __init__(self, accelerator: Accelerator, output: Path, title: str, steps: int, *, done: int) -> None:
        super().__init__(title, steps, done, enabled=accelerator.is_main_process)
        self.accelerator = accelerator
        self._path, self._steps, self._since = output / METRICS, 0, time.monotonic()
        self._sums: dict[str, Tensor] = {}
        if accelerator.is_main_process and self._path.exists():  # a resumed run writes later lines again
            kept = [record for record in read_metrics(self._path) if record["step"] <= done]
            write_file(self._path, "".join(json.dumps(record) + "\n" for record in kept))

    def open_tracker(self, section: Mapping[str, Any] | None, config: Mapping[str, Any]) -> None:
        """Start the tracker that the accelerator was made with, if any, in the output folder."""
        if (name := check_tracker(section)) is None:
            return
        folder, project = self._path.parent, section.get("project", name)
        wandb = {"mode": section.get("mode"), "name": folder.name, "dir": str(folder), "config": config}
        self._track(lambda: self.accelerator.init_trackers(project, init_kwargs={"wandb": wandb}))

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Take in the scalars of one step."""
        for name, value in scalars.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def averages(self) -> tuple[dict[str, float], int, float]:
        """Means over the steps since the last call and over processes; those steps, and their seconds."""
        steps, seconds = self._steps, max(time.monotonic() - self._since, 1e-9)
        if steps == 0:
            return {}, 0, seconds
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name].float() for name in names])
        means = self.accelerator.reduce(sums / steps, "mean").tolist()
        self._sums, self._steps, self._since = {}, 0, time.monotonic()
        return dict(zip(names, means)), steps, seconds

    def write(self, kind: str, step: int, record: Mapping[str, Any], *, say: str = "") -> None:
        """Append one line, and `say` something of it at the terminal; its numbers also go to the tracker.

        `kind` is train, epoch, preview, evaluate, spike, left_out or bad_sample.
        """
        if not self.accelerator.is_main_process:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **record}) + "\n")
        if say:
            self.say(say)
        numbers = {f"{kind}/{name}": v for name, v in record.items() if isinstance(v, int | float)}
        self._track(lambda: self.accelerator.log(numbers, step))

    def _track(self, action: Callable[[], None]) -> None:
        """Let the tracker do something, which training does not depend on."""
        try:
            action()
        except Exception as error:  # whatever its client raises
            self.accelerator.trackers.clear()
            lost = f"the run continues without it, {METRICS} has all numbers"
            warnings.warn(f"tracker: {one_line(error)}; {lost}", stacklevel=3)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside this context does not count in the rates."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def close_tracker(self) -> None:
        """Close the tracker; `end_training` would also end the processes, which may train again."""
        for tracker in list(self.accelerator.trackers):
            self._track(tracker.finish)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; an unfinished last line is left out, another damaged one a UserError."""
    with reading(path, "give the output folder of a training run"):
        lines, records = path.read_text(errors="replace").splitlines(), []
    for number, line in enumerate(lines, start=1):
        unfinished = suppress(UserError) if number == len(lines) else nullcontext()
        with unfinished, reading(f"{path}: line {number}", "delete that line"):
            record = json.loads(line)
            if not (isinstance(record["kind"], str) and isinstance(record["step"], int)):
                raise ValueError("no record of a run")
            records.append(record)
    return records


@dataclass
class SpikeDetector:
    """Finds losses far above the recent ones, by their exponential mean and variance."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    FIRST = 50  # steps without a verdict
    MEMORY = 200  # steps
    DEVIATIONS = 6.0
    FACTOR = 2.0  # and so many times the mean: where all losses are equal, noise is no spike

    def is_spike(self, loss: float) -> bool:
        """Whether the loss of a step is a spike; then takes it into mean and variance."""
        excess, limit = loss - self.mean, self.DEVIATIONS * math.sqrt(self.variance)
        spike = self.steps >= self.FIRST and excess > limit and loss > self.FACTOR * self.mean
        self.steps += 1
        share = 1 / min(self.steps, self.MEMORY)
        self.mean += share * excess
        self.variance = (1 - share) * (self.variance + share * excess**2)
        return spike
