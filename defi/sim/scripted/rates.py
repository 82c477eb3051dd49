"""How often the scripted policies succeed, judged, in play."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from rich.table import Table

from defi.sim.collect.config import PlayConfig
from defi.sim.collect.play import Player
from defi.sim.collect.sessions import in_processes
from defi.sim.scene import SceneConfig
from defi.sim.tasks import TASKS
from defi.sim.world import World


def measure(
    scene: SceneConfig,
    tasks: Sequence[str],
    *,
    n: int,
    seed: int,
    noise: float,
    max_steps: int,
    workers: int,
) -> Iterator[list[dict]]:
    """Attempts of `n` sessions of play (`Attempt.summary`), as they are finished; each in a world of its own.

    A session tries every task once, and more often those that make others possible. Gaussian noise disturbs
    the executed motion: its deviation, up to `noise` (in units of an action), is drawn for each attempt.
    """
    config = PlayConfig(
        noise_probability=float(noise > 0),
        noise_position=noise,
        noise_rotation=noise,
        noise_correlation=0.0,
        reset=0.25,
        random_arm=0.5,
        hold=max_steps,
        at_once=0.25,
        max_steps=max_steps,
        attempts=1,
    )
    work = partial(_play, scene=scene, tasks=tasks, seed=seed, config=config)
    return (attempts for _, attempts in in_processes(work, range(n), workers))


def _play(
    session: int, *, scene: SceneConfig, tasks: Sequence[str], seed: int, config: PlayConfig
) -> list[dict]:
    with World(scene, cameras=()) as world:
        player = Player(world, config, np.random.default_rng([seed, session]))
        return [attempt.summary() for attempt in player.play(tasks)]


def success_rates(attempts: Iterable[dict]) -> dict[str, dict[str, float | int | None]]:
    """Numbers per task, in the order of `TASKS`; steps are those to success."""
    rates = {}
    for task in TASKS:
        steps = [attempt["solved_after"] for attempt in attempts if attempt["task"] == task]
        solved = [count for count in steps if count is not None]
        if steps:
            rates[task] = {
                "trials": len(steps),
                "solved": len(solved),
                "rate": len(solved) / len(steps),
                "median_steps": float(np.median(solved)) if solved else None,
                "max_steps": max(solved, default=None),
            }
    return rates


def rate_table(title: str, attempts: Iterable[dict]) -> Table:
    """`success_rates` to be printed; green from 90 % on."""
    table = Table("task", title=title)
    for column in ("attempts", "solved", "rate", "median steps"):
        table.add_column(column, justify="right")
    for task, numbers in success_rates(attempts).items():
        style, median = "green" if numbers["rate"] >= 0.9 else "red", numbers["median_steps"]
        rate, steps = f"[{style}]{numbers['rate']:.0%}[/]", "–" if median is None else f"{median:.0f}"
        table.add_row(task, str(numbers["trials"]), str(numbers["solved"]), rate, steps)
    return table
