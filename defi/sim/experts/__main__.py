"""Success rates of the experts: `python -m defi.sim.experts scene=D n=50`."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from defi.config import entry
from defi.engine.output import write_file
from defi.errors import UserError
from defi.sim.experts import EXPERT_TASKS
from defi.sim.experts.rates import Trial, measure
from defi.sim.scenes import builtin
from defi.sim.tasks import check_tasks


def summarise(trials: Sequence[Trial]) -> dict[str, float | int | None]:
    """Numbers of one task: trials, successes, rate, median and greatest steps to success."""
    steps = [trial.solved_after for trial in trials if trial.solved_after is not None]
    return {
        "trials": len(trials),
        "solved": len(steps),
        "rate": len(steps) / len(trials),
        "median_steps": float(np.median(steps)) if steps else None,
        "max_steps": max(steps, default=None),
    }


def table(rates: dict[str, dict[str, dict]]) -> Table:
    """Rates per task and scene, with the median steps to success."""
    result = Table("task", title="Experts, by the judge's word")
    for scene in rates:
        result.add_column(f"{scene} solved", justify="right")
        result.add_column("steps", justify="right")
    for task in next(iter(rates.values())):
        cells = []
        for numbers in rates.values():
            rate, median = numbers[task]["rate"], numbers[task]["median_steps"]
            style = "green" if rate >= 0.9 else "red"
            cells += [f"[{style}]{rate:.0%}[/]", "–" if median is None else f"{median:.0f}"]
        result.add_row(task, *cells)
    return result


@entry("experts")
def main(cfg: DictConfig) -> None:
    """Measure; see configs/experts.yaml."""
    tasks = EXPERT_TASKS if cfg.tasks == "all" else check_tasks(cfg.tasks)
    scenes = {name: builtin(name) for name in cfg.scene}
    for key in ("n", "workers", "max_steps"):
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise UserError(f"{key}={cfg[key]}: expected a whole number of 1 or more")
    output = Path(cfg.output)
    if not output.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}; make it or choose another")
    console, start = Console(), time.perf_counter()
    rates: dict[str, dict[str, dict]] = {}
    for name, scene in scenes.items():
        settings = {key: cfg[key] for key in ("n", "seed", "noise", "max_steps", "workers")}
        trials = measure(scene, tasks, **settings)
        shown = track(trials, f"scene {name}", total=len(tasks), console=console)
        rates[name] = {task: summarise(tries) for task, tries in shown}
        write_file(output, json.dumps(rates, indent=1))
    console.print(table(rates))
    console.print(f"{output}: written after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
