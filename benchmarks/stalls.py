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
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from defi.config import one_line_errors
from defi.engine.data import seed_of
from defi.robot.chunk import UnderWay
from defi.robot.client import Runner
from defi.sim.judge import solved
from defi.sim.renderers import find_renderer
from Step3_DeFI.acting import Policy, policy_threads
from Step3_DeFI.rollout.fleet import shown
from Step3_DeFI.rollout.protocol import RolloutConfig, SimConfig, build_chains, build_scene, world_maker
from Step3_DeFI.rollout.results import paired_difference
from Step3_DeFI.rollout.simulator import ChainSpec, Observation

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


def attempt(world: Any, policy: Any, chain: ChainSpec, way: Way, *, limit: int, seed: int) -> Episode:
    """One episode; `policy.robot` says the rate and which actions are changes."""
    rng, noted, robot = np.random.default_rng((seed, chain.index)), Noted(policy), policy.robot
    late = Late(lambda: way.steps(robot.fps, rng), lambda: runner.steps)
    settings = {"executed": way.executed, "relative": robot.actions.relative, "submit": late.submit}
    runner = Runner(noted, way.mode, seed=seed_of("stalls", seed, chain.index), **settings)
    world.reset(chain.robot_obs, chain.scene_obs)
    start, last, stalled, fresh, reached = world.state(), None, False, False, False
    changes: dict[bool, list[float]] = {True: [], False: []}

    def observe() -> dict[str, Any]:
        task, words = chain.tasks[0], chain.instructions[0]
        return shown(Observation((seed, chain.index, 0), task, words, world.render(), world.robot_obs()))

    while runner.steps < limit and not reached:
        answers, idle = runner.answers, runner.idle
        action = runner.step(observe)
        fresh = fresh or runner.answers > answers
        stalls = runner.idle > idle
        seam = stalls != stalled or (fresh and not stalls and runner.taken > noted.held)
        if last is not None and not (stalls and stalled):
            changes[seam].append(float(np.square(action - last)[MOVING].sum()))
        fresh, stalled, last = fresh and not seam, stalls, action
        world.step(action.astype(np.float64))
        reached = solved(chain.tasks[0], start, world.state())
    size = len(range(*MOVING.indices(len(action))))
    sums = {each: (sum(found), len(found) * size) for each, found in changes.items()}
    return Episode(reached, runner.steps, runner.idle, runner.answers, sums[True], sums[False])


def episodes(given: argparse.Namespace) -> tuple[list[ChainSpec], Callable[[], Any], dict[str, str]]:
    """Single tasks in scene D, what makes their world, and the environment that its renderer needs."""
    sim = SimConfig(static_size=128)  # as the quickstart has it
    config = RolloutConfig(chains=given.episodes, length=1, tasks=TASKS, seed=given.seed, sim=sim)
    scene, renderer = build_scene(sim, config.scene), find_renderer("cpu")
    _, chains = build_chains(config, scene)
    return chains, world_maker(sim, scene, renderer.backend), renderer.environment


@cache
def load(checkpoint: str, settings: tuple[tuple[str, Any], ...]) -> Policy:
    """Once per process."""
    return Policy.load(checkpoint, precision="no", **dict(settings))


def measure(given: argparse.Namespace, way: Way) -> list[Episode]:
    """All episodes, one way. Each in a world that knows nothing of those before."""
    chains, make_world, environment = episodes(given)
    os.environ.update(environment)
    policy, found = load(given.checkpoint, tuple(given.settings)), []
    with policy_threads(1), closing(make_world()) as world:
        for chain in chains:
            world.reload()
            found.append(attempt(world, policy, chain, way, limit=given.limit, seed=given.seed))
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
