"""Motion while the policy thinks: `python -m benchmarks.stalls --checkpoint RUN --output FOLDER`.

A simulated arm on the built-in table that a policy drives through `defi.robot.client.Runner`, whose answers
come so many control steps late. Time is counted in control steps, nothing sleeps, and a run is repeatable.
Every way of running meets the same episodes: single tasks, the same starts and seeds.
  success  of the tasks within the limit, stalls included, with Wilson's 95 % interval
  idle     control steps in which no action was there, of all
  seam     rms change of action (position and rotation) where one chunk follows another, or motion stalls,
           divided by that within chunks
"""

import argparse
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from defi.benchmarks.benchmark import Environment, Step
from defi.benchmarks.calvin.benchmark import Calvin, SimConfig
from defi.benchmarks.calvin.environment import Chain
from defi.benchmarks.statistics import paired_difference
from defi.config import one_line_errors
from defi.engine.data import seed_of
from defi.robot.chunk import UnderWay
from defi.robot.client import Runner
from Step3_DeFI.acting import Policy

TASKS = ["open_drawer", "close_drawer", "move_slider_left", "move_slider_right"]
TASKS += ["turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led", "turn_off_led"]  # the quickstart's
ARMS = 8  # that move in step, so that the policy is called once for all of them
CHUNK, HALF = 10, 500 / 3  # actions of a chunk; ms, of half a chunk at 30 actions per second
MOVING = slice(0, 6)  # of an action: all but the gripper, which jumps by nature


@dataclass(frozen=True)
class Way:
    """A way of running: mode and horizon of the runner; latency in ms, and how far it strays, uniformly.

    fade: the policy's setting for chunks that go on from others; None: as the checkpoint has it.
    """

    mode: str
    executed: int
    latency: float = 0
    jitter: float = 0
    fade: int | None = None

    def steps(self, rate: float, rng: np.random.Generator) -> int:
        """Control steps that an answer takes."""
        milliseconds = self.latency + self.jitter * rng.uniform(-1, 1)
        return max(0, math.ceil(milliseconds * rate / 1000 - 1e-3))

    def __str__(self) -> str:
        jitter = f" ± {self.jitter:g}" if self.jitter else ""
        fade = "" if self.fade is None else f", fade {self.fade}"
        return f"{self.mode}, {self.executed} per look, {self.latency:.0f}{jitter} ms{fade}"


WAYS = [
    Way("sync", CHUNK),
    Way("rtc", CHUNK // 2, HALF),
    Way("async", CHUNK // 2, HALF),
    Way("sync", CHUNK // 2),  # without latency, async is the same as this
    Way("sync", CHUNK, HALF),
    *(Way(mode, n, 400) for mode, n in (("rtc", 5), ("async", 5), ("sync", 10))),
    *(Way("rtc", CHUNK // 2, ms) for ms in (0, 100, 267)),
    Way("rtc", CHUNK // 2, 117, 50),
    *(Way("rtc", CHUNK // 2, HALF, fade=fade) for fade in (1, 2)),
]


@dataclass(frozen=True)
class Episode:
    """What became of one task. Sums of squares of the changes of action, and how many numbers are in them."""

    solved: bool
    steps: int
    idle: int
    looks: int
    seam: tuple[float, int]
    inside: tuple[float, int]


class Batch:
    """Collects what several arms ask, and calls the policy for all of it when the first answer is due."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.waiting = policy, []

    def flush(self) -> None:
        """Answer all that wait."""
        asked, self.waiting = self.waiting, []
        given = [[each.given[i] for each in asked] for i in range(3)]
        for each, answer in zip(asked, self.policy.infer_batch(*given)):
            each.answer = answer


class Late:
    """The policy of one arm and the executor it runs in: an answer is there some control steps later.

    held: actions of the last answer that were under way.
    """

    def __init__(self, batch: Batch, wait: Callable[[], int]) -> None:
        self._batch, self._wait = batch, wait
        self.held, self.now = 0, lambda: 0

    def infer(self, observation: Any, seed: int, under_way: UnderWay | None) -> None:
        self.given, self.answer = (observation, seed, under_way), None
        self._batch.waiting.append(self)
        self.held = under_way.delay if under_way else 0

    def submit(self, function: Callable[[], None]) -> "Late":
        function()
        self._due = self.now() + self._wait()
        return self

    def done(self) -> bool:
        return self.now() >= self._due

    def result(self) -> np.ndarray:
        if self.answer is None:
            self._batch.flush()
        return self.answer


def attempt(
    environment: Environment, batch: Batch, chain: Chain, way: Way, *, seed: int
) -> Generator[None, None, Episode]:
    """One episode, a control step at a time."""
    rng, robot = np.random.default_rng((seed, chain.index)), batch.policy.robot
    late = Late(batch, lambda: way.steps(robot.fps, rng))
    settings = {"executed": way.executed, "relative": robot.actions.relative, "submit": late.submit}
    runner = Runner(late, way.mode, seed=seed_of("stalls", seed, chain.index), **settings)
    late.now = lambda: runner.steps
    environment.reset(chain)
    step, last, stalled, fresh = Step(), None, False, False
    changes: dict[bool, list[float]] = {True: [], False: []}
    while not step.over:
        answers, idle = runner.answers, runner.idle
        action = runner.step(environment.observe)
        fresh = fresh or runner.answers > answers
        stalls = runner.idle > idle
        seam = stalls != stalled or (fresh and not stalls and runner.taken > late.held)
        if last is not None and not (stalls and stalled):
            changes[seam].append(float(np.square(action - last)[MOVING].sum()))
        fresh, stalled, last = fresh and not seam, stalls, action
        step = environment.step(action)
        yield
    size = len(range(*MOVING.indices(len(action))))
    sums = {each: (sum(found), len(found) * size) for each, found in changes.items()}
    return Episode(step.solved, runner.steps, runner.idle, runner.answers, sums[True], sums[False])


def episodes(given: argparse.Namespace) -> tuple[list[Chain], Callable[[], Environment]]:
    """Single tasks in scene D, and what makes their world."""
    sim = SimConfig(static_size=128)  # as the quickstart has it
    benchmark = Calvin(chains=given.episodes, length=1, tasks=TASKS, max_steps=[given.limit], sim=sim)
    return benchmark.episodes(given.seed), benchmark.environment


@cache
def load(checkpoint: str, fade: int | None) -> Policy:
    """Once per process."""
    torch.set_num_threads(1)
    settings = {} if fade is None else {"fade": fade}
    return Policy.load(checkpoint, precision="no", **settings)


def measure(given: argparse.Namespace, way: Way) -> list[Episode]:
    """The episodes of a way: several worlds in step, each with the next episode that is left."""
    key = not way.jitter and way.latency in (0, HALF) and way != Way("rtc", CHUNK // 2)
    count = given.episodes if key else min(given.few, given.episodes)
    chains, make = episodes(given)
    found: dict[int, Episode] = {}
    policy = load(given.checkpoint, way.fade)
    left, batch = iter(chains[:count]), Batch(policy)

    def arm(environment: Environment) -> Iterator[None]:
        for chain in left:
            found[chain.index] = yield from attempt(environment, batch, chain, way, seed=given.seed)

    with ExitStack() as stack:
        arms = [arm(stack.enter_context(closing(make()))) for _ in range(ARMS)]
        while arms:
            arms = [each for each in arms if next(each, "over") is None]
    return [found[chain.index] for chain in chains[:count]]


def summary(way: Way, found: Sequence[Episode], bases: Mapping[str, Sequence[Episode]]) -> dict[str, Any]:
    """Figures of a way, and its success against that of others in the same episodes (`bases`)."""
    test = binomtest(sum(each.solved for each in found), len(found))
    steps, idle = (sum(getattr(each, name) for each in found) for name in ("steps", "idle"))

    def rms(name: str) -> float:
        squares, numbers = (sum(getattr(each, name)[i] for each in found) for i in range(2))
        return math.sqrt(squares / max(1, numbers))

    def against(base: Sequence[Episode]) -> dict[str, Any]:
        here, there = (np.array([each.solved for each in some], int) for some in (found, base))
        return paired_difference(there[: len(here)], here)

    return {
        **asdict(way),
        "episodes": len(found),
        "solved": [int(each.solved) for each in found],
        "success": test.statistic,
        "interval": list(map(float, test.proportion_ci(method="wilson"))),
        "against": {name: against(base) for name, base in bases.items()},
        "steps": steps / len(found),
        "looks": sum(each.looks for each in found) / len(found),
        "idle_steps": idle,
        "idle": idle / steps,
        "seam": rms("seam"),
        "inside": rms("inside"),
        "roughness": rms("seam") / max(rms("inside"), 1e-12),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line per way."""
    drawn = Table(box=SIMPLE)
    for name in (
        "way",
        "episodes",
        "success",
        "95 %",
        "against no latency",
        "idle",
        "seam",
        "inside",
        "ratio",
    ):
        drawn.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        way = Way(*(row[each.name] for each in fields(Way)))
        low, high = row["interval"]
        change = next(iter(row["against"].values()), None)
        ends = change and "{:+.1%} … {:+.1%}".format(*change["interval"])
        drawn.add_row(
            str(way),
            str(row["episodes"]),
            f"{row['success']:.1%}",
            f"{low:.0%} … {high:.0%}",
            f"{change['difference']:+.1%} ({ends})" if change else "",
            f"{row['idle']:.1%}",
            f"{row['seam']:.3f}",
            f"{row['inside']:.3f}",
            f"{row['roughness']:.2f}",
        )
    return drawn


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Success, idle steps and roughness over latency, a line per mode."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = {"success": "tasks solved", "idle": "idle steps", "roughness": "seams ÷ inside a chunk"}
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items()):
        for mode, colour in {"sync": "tab:gray", "async": "tab:orange", "rtc": "tab:blue"}.items():
            line = sorted((row["latency"], row[key], row["interval"]) for row in rows if shows(row, mode))
            x, y = ([each[i] for each in line] for i in range(2))
            axes.plot(x, y, "o-", color=colour, label=mode, markersize=4)
            if key == "success":
                low, high = ([each[2][i] for each in line] for i in range(2))
                axes.vlines(x, low, high, color=colour, alpha=0.3, linewidth=3)
        axes.set(xlabel="latency (ms)", ylabel=label, ylim=(0, None if key == "roughness" else 1))
        axes.axvline(HALF, color="0.8", linewidth=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(1.5, color="0.6", linewidth=1, linestyle=":", zorder=0)
    axes.legend(frameon=False)
    return figure


def shows(row: Mapping[str, Any], mode: str) -> bool:
    """Whether a row is on a mode's line: looking ahead without latency is looking every 5 actions."""
    same = row["mode"] == mode or (mode == "async" and row["latency"] == 0 and row["mode"] == "sync")
    return (
        same
        and not row["jitter"]
        and row["fade"] is None
        and row["executed"] == (CHUNK if mode == "sync" else CHUNK // 2)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a policy of CALVIN's robot, a quickstart's say")
    parser.add_argument("--output", type=Path, default=Path("outputs/stalls"), help="for stalls.json, .png")
    parser.add_argument("--episodes", type=int, default=240, help="without latency, and at half a chunk")
    parser.add_argument("--few", type=int, default=48, help="at the other latencies")
    parser.add_argument("--limit", type=int, default=120, help="control steps per episode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with one_line_errors(), ProcessPoolExecutor(given.processes) as pool:
        ways = {pool.submit(measure, given, way): way for way in WAYS}
        for done in as_completed(ways):
            done.result()
            found = {way: job.result() for job, way in ways.items() if job.done()}
            bases = {str(way): found[way] for way in found if way.mode == "sync" and not way.latency}
            rows = [summary(way, episodes, bases) for way, episodes in found.items()]
            record = {"limit": given.limit, "seed": given.seed, "chunk": CHUNK, "ways": rows}
            (given.output / "stalls.json").write_text(json.dumps(record, indent=1))
    Console(highlight=False, width=130).print(table(rows))
    draw(rows).savefig(given.output / "stalls.png", dpi=100)


if __name__ == "__main__":
    main()
