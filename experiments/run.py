"""Run a suite: `python -m experiments.run suite=ablation` (configs/experiments.yaml, docs/experiments.md)."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from defi.config import entry
from defi.errors import UserError
from experiments import report
from experiments.plan import ArmConfig, Run, build_runs, distinct_steps, read_arms
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


def steps_table(workshop: Workshop) -> Any:
    """Every kind of step: how many there are, how many are done, what is left, in order."""
    lines = []
    for name in dict.fromkeys(step.name for step in workshop.steps.values()):
        keys = [key for key, step in workshop.steps.items() if step.name == name]
        left = [key for key in keys if not workshop.is_done(key)]
        time = timedelta(seconds=round(workshop.seconds_left(left)))
        lines.append((name, str(len(keys)), str(len(keys) - len(left)), str(time)))
    left = [key for key in workshop.steps if not workshop.is_done(key)]
    done = len(workshop.steps) - len(left)
    total = timedelta(seconds=round(workshop.seconds_left(left)))
    lines.append(("all", str(len(workshop.steps)), str(done), str(total)))
    return text_table("Steps, and the time left on two cores", ("step", "steps", "done", "left"), lines)


@entry("experiments")
def main(cfg: DictConfig) -> None:
    suite = OmegaConf.to_container(cfg, resolve=True)
    arms, runs = plan(suite)
    whole = plan(suite | {"task": None})[1]  # the page shows what the other parts have done, too
    name = suite["name"] if suite["size_name"] == "cpu" else f"{suite['name']}-{suite['size_name']}"
    output, console = Path(suite["output"]), Console(highlight=False)
    folder, everything = output / name, Workshop(output, distinct_steps(whole))
    workshop = Workshop(output, distinct_steps(runs))
    if suite["plan"]:
        console.print(steps_table(workshop))
        return
    workshop.work(
        lambda step: step.name == runs[0].last.name and report.write(folder, suite, arms, whole, everything)
    )
    page = report.write(folder, suite, arms, whole, everything)
    told = [f"{key}: {why}" for key, why in workshop.failed.items()]
    for line in (*told, *([f"Report: {page}"] if page else [])):
        console.print(line, markup=False, soft_wrap=True)
    if told:
        raise UserError(f"{len(told)} steps failed or were left out; mend it and run the same command again")


if __name__ == "__main__":
    main()
