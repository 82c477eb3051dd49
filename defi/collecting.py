"""What every collection of demonstrations needs, whatever the simulator: folder, processes, noise."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Float64
from rich.table import Table

from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from defi.files import read_json

SETTINGS, MANIFEST = "settings.json", "manifest.json"
Item, Result = TypeVar("Item"), TypeVar("Result")
Rates = dict[str, dict[str, float | int | None]]  # of each task
POSITIVE, NOT_NEGATIVE, SHARE = (1, math.inf), (0, math.inf), (0, 1)
NOISE = {"noise_probability": SHARE, "noise_position": NOT_NEGATIVE, "noise_rotation": NOT_NEGATIVE}
NOISE |= {"noise_correlation": SHARE}


class Collection(Protocol):
    """Settings of a collection."""

    output: str
    resume: bool
    overwrite: bool

    def identity(self) -> dict[str, Any]:
        """The settings that the data depend on."""
        ...


class Noise(Protocol):
    """Largest standard deviations, and the correlation from step to step."""

    noise_position: float
    noise_rotation: float
    noise_correlation: float


def check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises UserError if a setting, `play.hold` say, is neither null nor in its range (low, high)."""
    for key, (low, high) in ranges.items():
        value = attrgetter(key)(config)
        if value is not None and not (low <= value <= high and value < math.inf):
            fit = f"be {low} or more" if high == math.inf else f"lie in {low} … {high}"
            raise UserError(f"{key}={value}: must {fit}")


def start_folder(config: Collection) -> Path:
    """The output folder, checked before anything is written, with the settings it is collected under."""
    output = check_output(config.output, resume=config.resume, overwrite=config.overwrite)
    written = output / SETTINGS
    if config.resume and output.is_dir() and any(output.iterdir()):
        check_same(
            written, read_json(written, "choose another output=, or overwrite=true"), config.identity()
        )
    prepare_output(output, resume=config.resume, overwrite=config.overwrite)
    write_file(written, json.dumps(config.identity(), indent=1))
    return output


def check_same(file: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UserError if the settings that a file keeps of a collection were others."""
    if changed := [key for key, value in settings.items() if before.get(key) != value]:
        problem = f"this collection was started with other settings ({', '.join(changed)})"
        raise UserError(f"{file}: {problem}; give the same ones, or overwrite=true")


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, output: Path
) -> Iterator[tuple[Item, Result]]:
    """What `work` returns of each item, as it is finished; of one worker in this process, else pickled."""
    if workers == 1:
        yield from ((item, work(item)) for item in items)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        fix = "continue with resume=true and fewer workers"
        raise UserError(f"{output}: a worker died (out of memory?); {fix}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Make this worker end when the main process is killed: a run that resumes must find nobody writing."""
    killed = parent_process().sentinel
    threading.Thread(target=lambda: wait([killed]) and os._exit(1), daemon=True).start()


def smooth_noise(config: Noise, rng: np.random.Generator) -> Iterator[Float64[np.ndarray, "7"]]:
    """First-order autoregressive noise on the pose, of a random size; the gripper is left alone."""
    sigma = np.array([config.noise_position] * 3 + [config.noise_rotation] * 3 + [0.0])
    sigma *= rng.uniform()
    kept = config.noise_correlation
    noise = sigma * rng.normal(size=7)
    while True:
        yield noise
        noise = kept * noise + np.sqrt(1 - kept**2) * sigma * rng.normal(size=7)


def success_rates(attempts: Sequence[Mapping[str, Any]], tasks: Iterable[str]) -> Rates:
    """Per task that was tried: attempts, how many were solved, and the steps that took.

    attempts: `task` and `solved_after`, steps or None, of each.
    """
    rates: Rates = {}
    for task in tasks:
        steps = [attempt["solved_after"] for attempt in attempts if attempt["task"] == task]
        solved = [count for count in steps if count is not None]
        if steps:
            median, longest = (float(np.median(solved)), max(solved)) if solved else (None, None)
            rates[task] = {"attempts": len(steps), "solved": len(solved), "rate": len(solved) / len(steps)}
            rates[task] |= {"median_steps": median, "max_steps": longest}
    return rates


def success_table(rates: Rates) -> Table:
    """For people."""
    columns = "task", "attempts", "solved", "rate", "median steps", "most"
    table = Table(*columns, title="Success of the policies")
    for task, numbers in rates.items():
        shown = (f"{number:.2f}" if isinstance(number, float) else number for number in numbers.values())
        table.add_row(task, *("–" if number is None else str(number) for number in shown))
    return table
