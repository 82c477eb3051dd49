"""A simulator process: chains of tasks come in, observations and results go out, over one connection.

A chain runs in one world: observe, act, judge, until a task is not solved in time. Nothing here needs
PyTorch, so a process starts fast and stays small. `fleet.Simulator` starts it; it ends when the other side of
the connection is closed, so none is left behind when the evaluation is killed.
"""

import itertools
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from defi.errors import UserError

Actions = Float[np.ndarray, "K 7"]
Images = Mapping[str, UInt8[np.ndarray, "H W 3"]]
Seed = tuple[int, int, int]  # (run, chain, observation): all that a random number may depend on
Judge = Callable[[str, Any, Any], bool]  # (task, state at its start, state now) → solved?
Agent = Callable[[Any, str, str, Seed], Actions]  # (world, task, instruction, seed) → what to do next

AGENTS = {"policy": "DeFI", "random": "random actions", "scripted": "scripted policy"}
GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # the other side of a connection


@dataclass(frozen=True)
class ChainSpec:
    """Tasks to solve one after the other, how they are asked for, and where the world starts."""

    index: int
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    robot_obs: Float[np.ndarray, "15"]
    scene_obs: Float[np.ndarray, "24"]


@dataclass(frozen=True)
class Observation:
    """What the policy is shown. Its noise depends on `seed` alone."""

    seed: Seed
    task: str
    instruction: str
    images: Images
    state: Float[np.ndarray, "15"]


@dataclass(frozen=True)
class Clip:
    """Pictures of one attempt at a task, by camera: uint8 [F,H,W,3]."""

    chain: int
    position: int
    task: str
    instruction: str
    solved: bool
    images: Mapping[str, UInt8[np.ndarray, "F H W 3"]]


@dataclass(frozen=True)
class ChainResult:
    """A finished chain. `steps` has the control steps per attempted task, None where it was not solved."""

    index: int
    tasks: tuple[str, ...]
    steps: tuple[int | None, ...]
    control_steps: int
    observations: int
    seconds: float


@dataclass(frozen=True)
class Setup:
    """What a simulator process gets first."""

    make_world: Callable[[], Any]  # returns a `defi.sim.world.World`, or something that behaves like one
    judge: Judge
    seed: int
    limit: int  # control steps per task
    agent: str = "policy"  # asked over the connection; or random or scripted: these act in this process
    # Load the world again before each chain. Bullet's contact order remembers what ran before in the same
    # world, so only then does a chain not depend on those before it.
    fresh: bool = True
    filmed: int = 0  # so many chains, the first, are filmed, a picture every `film_every` control steps
    film_every: int = 3
    environment: Mapping[str, str] = field(default_factory=dict)  # variables for the process


def random_agent(world: Any, task: str, instruction: str, seed: Seed) -> Actions:
    """Uniform actions in [-1, 1], the gripper at random per chunk of 10: what chance alone achieves."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (10, 7))
    actions[:, 6] = actions[0, 6]
    return actions


class ScriptedAgent:
    """The scripted policy of each task, which sees the true state: what the table itself allows."""

    begun = None

    def __call__(self, world: Any, task: str, instruction: str, seed: Seed) -> Actions:
        from defi.sim.scripted import ScriptedPolicy

        if self.begun != (seed[1], task):
            self.begun, self.policy = (seed[1], task), ScriptedPolicy(task, world)
        action = self.policy.act(world)
        waiting = [0, 0, 0, 0, 0, 0, world.arm.gripper_action]  # where it is done, as far as it can tell
        return np.array([waiting if action is None else action], dtype=np.float64)


def run_chain(world: Any, agent: Agent, chain: ChainSpec, setup: Setup) -> Iterator[Clip | ChainResult]:
    """Run a chain to its first unsolved task: a clip of each attempt, if it is filmed, then the result."""
    began, steps = time.perf_counter(), []
    seeds = ((setup.seed, chain.index, observation) for observation in itertools.count())
    film = chain.index < setup.filmed
    world.reset(chain.robot_obs, chain.scene_obs)
    for position, (task, words) in enumerate(zip(chain.tasks, chain.instructions)):
        taken, frames = attempt(world, agent, task, words, seeds, setup, film=film)
        steps.append(taken)
        if film:
            images = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
            yield Clip(chain.index, position, task, words, taken is not None, images)
        if taken is None:
            break
    yield ChainResult(
        index=chain.index,
        tasks=chain.tasks,
        steps=tuple(steps),
        control_steps=sum(setup.limit if taken is None else taken for taken in steps),
        observations=next(seeds)[2],
        seconds=time.perf_counter() - began,
    )


def attempt(
    world: Any,
    agent: Agent,
    task: str,
    words: str,
    seeds: Iterator[Seed],
    setup: Setup,
    *,
    film: bool = False,
) -> tuple[int | None, list[Images]]:
    """Try one task for at most `setup.limit` control steps; judged after every step.

    Returns:
        The control steps it took, or None; pictures of the first state, every `film_every`-th step, and the
        last. What is left of a chunk when the task is solved is not executed.
    """
    start, taken = world.state(), 0
    frames = [world.render()] if film else []
    while taken < setup.limit:
        chunk = agent(world, task, words, next(seeds))[: setup.limit - taken]
        actions = np.array(chunk, dtype=np.float64)
        actions[:, 6] = np.where(actions[:, 6] > 0, 1.0, -1.0)  # the gripper opens, or closes
        for action in actions:
            world.step(action)
            taken += 1
            solved = setup.judge(task, start, world.state())
            if film and (solved or taken % setup.film_every == 0):
                frames.append(world.render())
            if solved:
                return taken, frames
    return None, frames


def main() -> None:
    """`python -c … <file descriptor>`: run the chains that arrive; send what goes wrong, as an exception."""
    # Ctrl-C and what Slurm sends reach every process of a run; the evaluation decides what becomes of them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))

    def ask_policy(world: Any, task: str, instruction: str, seed: Seed) -> Actions:
        connection.send(Observation(seed, task, instruction, world.render(), world.robot_obs()))
        return connection.recv()

    agents = {"policy": ask_policy, "random": random_agent, "scripted": ScriptedAgent()}
    try:
        setup: Setup = connection.recv()
        with closing(setup.make_world()) as world:
            while True:
                for message in run_chain(world, agents[setup.agent], connection.recv(), setup):
                    connection.send(message)
                if setup.fresh:
                    world.reload()
    except GONE:
        return
    except UserError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"fault in a simulator process\n{traceback.format_exc()}"))
