"""Success rates of the scripted policies: `python -m defi.sim.scripted scene=D n=50`."""

import json
import time
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from defi.config import entry
from defi.engine.output import write_file
from defi.errors import UserError
from defi.sim.scenes import builtin
from defi.sim.scripted.rates import measure, rate_table, success_rates
from defi.sim.tasks import TASKS, check_tasks


@entry("scripted")
def main(cfg: DictConfig) -> None:
    """Measure; see configs/scripted.yaml."""
    tasks = TASKS if cfg.tasks == "all" else check_tasks(cfg.tasks)
    scenes = {name: builtin(name) for name in cfg.scene}
    for key in ("n", "workers", "max_steps"):
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise UserError(f"{key}={cfg[key]}: must be a whole number, at least 1")
    output = Path(cfg.output)
    if not output.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}; make it or choose another")
    console, start = Console(), time.perf_counter()
    settings = {key: cfg[key] for key in ("n", "seed", "noise", "max_steps", "workers")}
    attempts: dict[str, list[dict]] = {}
    for name, scene in scenes.items():
        sessions = track(measure(scene, tasks, **settings), f"scene {name}", total=cfg.n, console=console)
        attempts[name] = [attempt for session in sessions for attempt in session]
        write_file(
            output, json.dumps({name: success_rates(tried) for name, tried in attempts.items()}, indent=1)
        )
        console.print(rate_table(f"Scripted policies, scene {name}", attempts[name]))
    console.print(f"{output}: written after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
