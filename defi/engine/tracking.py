"""The numbers of a run: always `metrics.jsonl`, and Weights & Biases or TensorBoard where configured."""

import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from defi.engine.output import write_file
from defi.errors import UserError
from defi.files import one_line

METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Where numbers go besides the file."""

    def __init__(self, section: Mapping[str, Any], output: Path, config: Mapping[str, Any]) -> None: ...

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases; offline unless `mode: online`."""

    def __init__(self, section: Mapping[str, Any], output: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=section["project"],
            mode=section["mode"],
            name=output.name,
            dir=str(output),
            config=dict(config),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files under `<output>/tensorboard`."""

    def __init__(self, section: Mapping[str, Any], output: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}


def find_tracker(section: Mapping[str, Any] | None) -> type[Tracker] | None:
    """The tracker that the `tracker` section of a configuration names; None for none.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    name = section["name"] if section else "none"
    if name == "none":
        return None
    if name not in TRACKERS:
        raise UserError(f"tracker.name={name}: choose none, {' or '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"tracker={name}: the package {name} is not installed; pip install {name}, or tracker=none"
        )
    return TRACKERS[name]


def open_tracker(
    section: Mapping[str, Any] | None, output: Path, config: Mapping[str, Any]
) -> Tracker | None:
    """The tracker of `find_tracker`, ready to log; None, with a warning, where its server does not answer."""
    tracker = find_tracker(section)
    if tracker is None or section is None:
        return None
    try:
        return tracker(section, output, config)
    except Exception as error:  # whatever its client raises: training does not need it
        _warn_of_loss(section["name"], error)
        return None


def _warn_of_loss(name: str, error: Exception) -> None:
    warnings.warn(
        f"tracker={name}: {one_line(error)}; the run goes on without it, {METRICS} has all numbers",
        stacklevel=3,
    )


class Journal:
    """Averages what the steps report and writes it, one JSON object per line, on the main process.

    Scalars are summed where they are computed and read only when a line is written: a step never waits for
    the device because of its log.
    """

    def __init__(self, accelerator: Accelerator, output: Path, step: int, tracker: Tracker | None) -> None:
        self.accelerator, self.tracker = accelerator, tracker
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._start = time.monotonic()
        self._path = output / METRICS
        if accelerator.is_main_process:
            forget_after(self._path, step)

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Take in the scalars of one step."""
        for name, value in scalars.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    @property
    def empty(self) -> bool:
        """Whether no step has been taken in since the last averages."""
        return self._steps == 0

    def averages(self) -> tuple[dict[str, float], int, float]:
        """Means over the steps since the last call and over processes; those steps, and their seconds."""
        names = sorted(self._sums)
        means = torch.stack([self._sums[name].float() for name in names]) / self._steps
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        steps, seconds = self._steps, max(time.monotonic() - self._start, 1e-9)
        self._sums, self._steps, self._start = {}, 0, time.monotonic()
        return dict(zip(names, means.tolist())), steps, seconds

    def write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """Append one line; `kind` is train, epoch, sample, evaluate, spike, left_out or bad_sample.

        Its numbers also go to the tracker.
        """
        if not self.accelerator.is_main_process:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **record}) + "\n")
        numbers = {
            f"{kind}/{name}": value for name, value in record.items() if isinstance(value, int | float)
        }
        self._tell(lambda tracker: tracker.log(numbers, step))

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        """Let the tracker do something; it is given up at its first error, as training does not need it."""
        if self.tracker is None:
            return
        try:
            action(self.tracker)
        except Exception as error:  # whatever its client raises
            _warn_of_loss(type(self.tracker).__name__, error)
            self.tracker = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside this context does not count in the rates."""
        start = time.monotonic()
        yield
        self._start += time.monotonic() - start

    def close(self) -> None:
        """Close the tracker."""
        self._tell(lambda tracker: tracker.close())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; a last line that was cut off is left out.

    Raises:
        UserError: the file is missing or a line inside it is not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; give the output folder of a training run")
    lines = path.read_text(errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record["kind"], str) and isinstance(record["step"], int)):
                raise ValueError("kind and step are missing")
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is no record of a run; delete that line") from None
    return records


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run will write again."""
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_file(path, "".join(json.dumps(record) + "\n" for record in kept))
