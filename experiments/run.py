"""Run a suite: `python -m experiments.run suite=ablation` (configs/experiments.yaml, docs/experiments.md)."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from defi.config import entry
from defi.errors import UserError
from experiments import report
from experiments.plan import END, ArmConfig, Run, build_runs, distinct_steps, read_arms
from experiments.work import Workshop
from Step3_DeFI.rollout.report import text_table


def plan(suite: dict[str, Any]) -> tuple[dict[str, ArmConfig], list[Run]]:
    """The arms and runs that the settings ask for.

    Raises:
        UserError: `only` names an arm that the suite does not have, or `task` is no part.
    """
    arms = read_arms(suite["arms"])
    if unknown := set(suite["only"] or ()) - arms.keys():
        raise UserError(f"only: no arm {min(unknown)}; there are {', '.join(arms)}")
    kept = {name: arm for name, arm in arms.items() if name in (suite["only"] or arms)}
    runs = build_runs(suite["steps"], kept, suite["seeds"])
    if suite["task"] is not None:
        part = re.fullmatch(r"(\d+)/(\d+)", str(suite["task"]))
        if not part or int(part[1]) >= int(part[2]):
            raise UserError(f"task={suite['task']}: write k/n with k from 0 to n − 1")
        runs = runs[int(part[1]) :: int(part[2])]
    return kept, runs


def steps_table(workshop: Workshop) -> Table:
    """Every kind of step: how many there are, how many are done, the time left."""
    lines, open_ = [], workshop.left()
    for name in (*dict.fromkeys(step.name for step in workshop.steps.values()), "all"):
        keys = [key for key, step in workshop.steps.items() if name in (step.name, "all")]
        left = [key for key in keys if key in open_]
        time = timedelta(seconds=round(workshop.seconds_left(left)))
        lines.append((name, str(len(keys)), str(len(keys) - len(left)), str(time)))
    return text_table("Steps, and the time left on two cores", ("step", "steps", "done", "left"), lines)


@entry("experiments")
def main(cfg: DictConfig) -> None:
    suite = OmegaConf.to_container(cfg, resolve=True)
    runs, (arms, whole) = plan(suite)[1], plan(suite | {"task": None, "only": None})
    name = suite["name"] if suite["size_name"] == "cpu" else f"{suite['name']}-{suite['size_name']}"
    output, console = Path(suite["output"]), Console(highlight=False)
    workshop, everything = (Workshop(output, distinct_steps(each)) for each in (runs, whole))
    if suite["plan"]:
        console.print(steps_table(workshop))
        return

    def page() -> Path | None:
        """Of all arms: other processes, or earlier starts, may have done what this one was not asked for."""
        return report.write(output / name, suite, arms, whole, everything)

    workshop.work(lambda step: step.name == END and page())
    told = [f"{key}: {why}" for key, why in workshop.failed.items()]
    for line in filter(None, (*told, (file := page()) and f"Report: {file}")):
        console.print(line, markup=False, soft_wrap=True)
    if told:
        raise UserError(f"{len(told)} steps failed or were left out; mend it and run the same command again")


if __name__ == "__main__":
    main()
