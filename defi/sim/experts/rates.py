"""How often an expert solves its task, by the judge's word, from random start states."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np

from defi.sim.experts import EXPERT_TASKS, Expert
from defi.sim.judge import solved
from defi.sim.play import path_to
from defi.sim.scene import SceneConfig
from defi.sim.sequences import initial_states, start_state
from defi.sim.tasks import TASK_TABLE, TASKS, Situation
from defi.sim.world import World

# How far from the protocol's pose the arm may start, in steps of 2 cm, along x, y and z.
WANDER = np.array([10.0, 4.0, 3.0])
STARTS = 20  # random starts tried until one can be set up
DETOUR = 0.5  # probability that another task is played before
AT_ONCE = 0.5  # probability that the next task is given as soon as the last is solved, before the retreat
# Solved while the hand still touches a block, or a block falls: always played to the end.
UNSETTLED = ("push", "rotate", "stack", "unstack")


@dataclass(frozen=True)
class Trial:
    """One try: control steps until the judge first called it solved (None: never), and until its end."""

    solved_after: int | None
    steps: int


def run_expert(world: World, task: str, *, max_steps: int, at_once: bool, noise: float, rng) -> Trial:
    """Let the expert act to its end, or, `at_once`, until the task is solved.

    Gaussian noise of deviation `noise` (in units of an action) disturbs the executed motion.
    """
    before, expert = world.state(), Expert(task, world)
    solved_after = None
    for step in range(max_steps):
        action = expert.act(world)
        if action is None:
            return Trial(solved_after, step)
        action[:6] = np.clip(action[:6] + noise * rng.normal(size=6), -1, 1)
        world.step(action)
        if solved_after is None and solved(task, before, world.state()):
            solved_after = step + 1
            if at_once:
                return Trial(solved_after, solved_after)
    return Trial(solved_after, max_steps)


def _wander(world: World, rng: np.random.Generator) -> None:
    offset = rng.uniform(-WANDER, WANDER)
    steps = int(np.ceil(np.abs(offset).max()))
    gripper = rng.choice([-1.0, 1.0])
    for _ in range(steps):
        world.step(np.array([*offset / steps, 0, 0, 0, gripper]))


def _way(task: str, rng: np.random.Generator) -> tuple[Situation, list[str]]:
    """A start of the protocol and the tasks to play from there until `task` can be given."""
    states = initial_states()
    while True:
        start = states[rng.integers(len(states))]
        situation, way = start, []
        if rng.random() < DETOUR:
            category = TASK_TABLE[task].category  # a chain of the protocol has none twice
            first = [
                name
                for name, other in TASK_TABLE.items()
                if other.category != category and other.outcome(start) is not None
            ]
            way = [str(rng.choice(first))]
            situation = TASK_TABLE[way[0]].outcome(start)
        path = path_to(situation, [task], EXPERT_TASKS)
        if path is not None:
            return start, way + path[:-1]


def random_start(world: World, task: str, rng: np.random.Generator, *, max_steps: int) -> None:
    """Put a newly loaded world into a random state in which `task` can be asked for.

    The arm starts near the protocol's pose, or where another task has left it.
    """
    for _ in range(STARTS):
        start, way = _way(task, rng)
        world.reset(*start_state(start))
        _wander(world, rng)
        trials = (
            run_expert(
                world,
                name,
                max_steps=max_steps,
                at_once=rng.random() < AT_ONCE and not name.startswith(UNSETTLED),
                noise=0,
                rng=rng,
            )
            for name in way
        )
        if all(trial.solved_after is not None for trial in trials):
            return
    raise RuntimeError(f"{task}: no start state could be set up in {STARTS} tries")


def measure_task(
    task: str, *, scene: SceneConfig, n: int, seed: int, noise: float, max_steps: int
) -> list[Trial]:
    """`n` trials of one task, each in a newly loaded world with a generator of its own."""
    trials = []
    with World(scene, cameras=()) as world:
        for i in range(n):
            rng = np.random.default_rng([seed, TASKS.index(task), i])
            world.reload()
            random_start(world, task, rng, max_steps=max_steps)
            trials.append(run_expert(world, task, max_steps=max_steps, at_once=False, noise=noise, rng=rng))
    return trials


def measure(
    scene: SceneConfig,
    tasks: Sequence[str],
    *,
    n: int,
    seed: int,
    noise: float,
    max_steps: int,
    workers: int,
) -> Iterator[tuple[str, list[Trial]]]:
    """Tasks and their trials as they are done, over `workers` processes; the same for any number of them."""
    work = partial(measure_task, scene=scene, n=n, seed=seed, noise=noise, max_steps=max_steps)
    if workers == 1:
        yield from ((task, work(task)) for task in tasks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from zip(tasks, pool.map(work, tasks))
