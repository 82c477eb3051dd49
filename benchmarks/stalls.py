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
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import binomtest

from defi.benchmarks.benchmark import Environment, Step
from defi.benchmarks.calvin.benchmark import Calvin, SimConfig
from defi.benchmarks.calvin.environment import Chain
from defi.benchmarks.statistics import paired_difference
from defi.engine.data import seed_of
from defi.robot.chunk import UnderWay
from defi.robot.client import Runner
from Step3_DeFI.acting import Policy, policy_threads

TASKS = ["open_drawer", "close_drawer", "move_slider_left", "move_slider_right"]
TASKS += ["turn_on_lightbulb", "turn_off_lightbulb", "turn_on_led", "turn_off_led"]  # the quickstart's
MOVING = slice(0, 6)  # of an action: all but the gripper, which jumps by nature


@dataclass(frozen=True)
class Way:
    """A way of running: mode and horizon of the runner; latency in ms, and how far it strays, uniformly."""

    mode: str
    executed: int
    latency: float = 0
    jitter: float = 0

    def steps(self, rate: float, rng: np.random.Generator) -> int:
        """Control steps that an answer takes."""
        milliseconds = self.latency + self.jitter * rng.uniform(-1, 1)
        return max(0, math.ceil(milliseconds * rate / 1000 - 1e-3))

    def __str__(self) -> str:
        jitter = f" ± {self.jitter:g}" if self.jitter else ""
        return f"{self.mode}, {self.executed} actions per look, {self.latency:g}{jitter} ms"


@dataclass(frozen=True)
class Episode:
    """What became of one task. Sums of squares of the changes of action, and how many numbers are in them."""

    solved: bool
    steps: int
    idle: int
    looks: int
    seam: tuple[float, int]
    inside: tuple[float, int]


class Late:
    """An executor whose futures are done some steps after they were begun, by the runner's own clock."""

    def __init__(self, wait: Callable[[], int], now: Callable[[], int]) -> None:
        self._wait, self._now = wait, now

    def submit(self, function: Callable[[], np.ndarray]) -> "Late":
        self._answer, self._due = function(), self._now() + self._wait()
        return self

    def done(self) -> bool:
        return self._now() >= self._due

    def result(self) -> np.ndarray:
        return self._answer


class Noted:
    """A policy, and how many actions of its last answer were those under way."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.held = policy, 0

    def infer(self, observation: Any, seed: int, under_way: UnderWay | None) -> np.ndarray:
        self.held = under_way.delay if under_way else 0
        return self.policy.infer(observation, seed, under_way)


def attempt(environment: Environment, policy: Any, chain: Chain, way: Way, *, seed: int) -> Episode:
    """One episode; `policy.robot` says the rate and which actions are changes."""
    rng, noted, robot = np.random.default_rng((seed, chain.index)), Noted(policy), policy.robot
    late = Late(lambda: way.steps(robot.fps, rng), lambda: runner.steps)
    settings = {"executed": way.executed, "relative": robot.actions.relative, "submit": late.submit}
    runner = Runner(noted, way.mode, seed=seed_of("stalls", seed, chain.index), **settings)
    environment.reset(chain)
    step, last, stalled, fresh = Step(), None, False, False
    changes: dict[bool, list[float]] = {True: [], False: []}
    while not step.over:
        answers, idle = runner.answers, runner.idle
        action = runner.step(environment.observe)
        fresh = fresh or runner.answers > answers
        stalls = runner.idle > idle
        seam = stalls != stalled or (fresh and not stalls and runner.taken > noted.held)
        if last is not None and not (stalls and stalled):
            changes[seam].append(float(np.square(action - last)[MOVING].sum()))
        fresh, stalled, last = fresh and not seam, stalls, action
        step = environment.step(action)
    size = len(range(*MOVING.indices(len(action))))
    sums = {each: (sum(found), len(found) * size) for each, found in changes.items()}
    return Episode(step.solved, runner.steps, runner.idle, runner.answers, sums[True], sums[False])


@cache
def load(checkpoint: str, settings: tuple[tuple[str, Any], ...]) -> Policy:
    """Once per process."""
    return Policy.load(checkpoint, precision="no", **dict(settings))


def measure(given: argparse.Namespace, way: Way) -> list[Episode]:
    """Single tasks in scene D, one way; each in a world that knows nothing of those before."""
    sim = SimConfig(static_size=128)  # as the quickstart has it
    table = Calvin(chains=given.episodes, length=1, tasks=TASKS, max_steps=[given.limit], sim=sim)
    policy, found = load(given.checkpoint, tuple(given.settings)), []
    with policy_threads(1), closing(table.environment()) as environment:
        for chain in table.episodes(given.seed):
            found.append(attempt(environment, policy, chain, way, seed=given.seed))
    return found


def summary(way: Way, found: Sequence[Episode], base: Sequence[Episode]) -> dict[str, Any]:
    """Figures of a way; `base`: the same episodes without latency."""
    test = binomtest(sum(each.solved for each in found), len(found))

    def rms(name: str) -> float:
        squares, numbers = (sum(getattr(each, name)[i] for each in found) for i in range(2))
        return math.sqrt(squares / max(1, numbers))

    solved_here, solved_there = (np.array([each.solved for each in some], int) for some in (found, base))
    return {
        **asdict(way),
        "episodes": len(found),
        "success": test.statistic,
        "interval": list(map(float, test.proportion_ci(method="wilson"))),
        "against_no_latency": paired_difference(solved_there, solved_here),
        "steps": sum(each.steps for each in found) / len(found),
        "idle": sum(each.idle for each in found) / sum(each.steps for each in found),
        "idle_steps": sum(each.idle for each in found),
        "looks": sum(each.looks for each in found) / len(found),
        "seam": rms("seam"),
        "inside": rms("inside"),
        "roughness": rms("seam") / max(rms("inside"), 1e-12),
    }
