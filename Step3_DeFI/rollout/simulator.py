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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from defi.errors import UserError

Actions = Float[np.ndarray, "K 7"]
Seed = tuple[int, int, int]
"""(run, chain, observation): all that a random number may depend on."""
Images = Mapping[str, UInt8[np.ndarray, "H W 3"]]
Judge = Callable[[str, Any, Any], bool]
"""(task, state at its start, state now) → solved?"""
Agent = Callable[[Any, str, str, Seed], Actions]
"""(world, task, instruction, seed) → the actions to execute before it is asked again."""

# Ctrl-C and what Slurm sends reach every process of a run. The evaluation, or the training around it, decides
# what becomes of them; a simulator ends with its connection, or is killed.
LEFT_TO_THE_EVALUATION = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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
    """What a simulator process gets first.

    Args:
        make_world: returns a `defi.sim.world.World`, or something that behaves like one.
        agent: who acts: policy (asked over the connection), random or scripted (both act in this process).
        limit: control steps per task.
        fresh: load the world anew before each chain. Bullet's contact order remembers what ran before
            in the same world, so only then does a chain not depend on those before it.
        filmed: so many chains, the first, are filmed, a picture every `film_every` control steps.
        environment: variables that the process is started with.
    """

    make_world: Callable[[], Any]
    judge: Judge
    agent: str
    seed: int
    limit: int
    fresh: bool = True
    filmed: int = 0
    film_every: int = 3
    environment: Mapping[str, str] = field(default_factory=dict)


def policy_agent(ask: Callable[[Observation], Actions]) -> Agent:
    """Shows the world to a policy elsewhere: `ask` sends an observation and returns its chunk of actions."""
    return lambda world, task, words, seed: ask(Observation(seed, task, words, world.render()))


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
        if action is None:  # done, as far as it can tell: wait
            action = np.array([0, 0, 0, 0, 0, 0, world.arm.gripper_action])
        return np.asarray(action, dtype=np.float64)[None]


def run_chain(world: Any, agent: Agent, chain: ChainSpec, setup: Setup) -> Iterator[Clip | ChainResult]:
    """Run a chain to its first unsolved task: a clip of each attempt, if it is filmed, then the result."""
    began, asked = time.perf_counter(), itertools.count()
    world.reset(chain.robot_obs, chain.scene_obs)
    steps: list[int | None] = []
    for position, (task, words) in enumerate(zip(chain.tasks, chain.instructions)):

        def act(task: str = task, words: str = words) -> Actions:
            return agent(world, task, words, (setup.seed, chain.index, next(asked)))

        taken, frames = attempt(world, act, task, setup, film=chain.index < setup.filmed)
        steps.append(taken)
        if frames:
            images = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
            yield Clip(chain.index, position, task, words, taken is not None, images)
        if taken is None:
            break
    yield ChainResult(
        index=chain.index,
        tasks=chain.tasks,
        steps=tuple(steps),
        control_steps=sum(setup.limit if taken is None else taken for taken in steps),
        observations=next(asked),
        seconds=time.perf_counter() - began,
    )


def attempt(
    world: Any, act: Callable[[], Actions], task: str, setup: Setup, *, film: bool = False
) -> tuple[int | None, list[Images]]:
    """Try one task for at most `setup.limit` control steps; judged after every step.

    Returns:
        The control steps it took, or None; pictures of the first state, every `film_every`-th step, and the
        last. What is left of a chunk when the task is solved is not executed.
    """
    start = world.state()
    frames = [world.render()] if film else []
    taken = 0
    while taken < setup.limit:
        for action in act()[: setup.limit - taken]:
            world.step(binarise(action))
            taken += 1
            solved = setup.judge(task, start, world.state())
            if film and (solved or taken % setup.film_every == 0):
                frames.append(world.render())
            if solved:
                return taken, frames
    return None, frames


def binarise(action: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
    """The gripper opens (+1) on positive values and closes (-1) otherwise."""
    action = np.array(action, dtype=np.float64)
    action[6] = 1.0 if action[6] > 0 else -1.0
    return action


def serve(connection: Connection) -> None:
    """Run the chains that arrive until the connection is closed."""
    setup: Setup = connection.recv()

    def ask(observation: Observation) -> Actions:
        connection.send(observation)
        return connection.recv()

    agents = {"policy": policy_agent(ask), "random": random_agent, "scripted": ScriptedAgent()}
    world = setup.make_world()
    try:
        while True:
            for message in run_chain(world, agents[setup.agent], connection.recv(), setup):
                connection.send(message)
            if setup.fresh:
                world.reload()
    finally:
        world.close()


def main() -> None:
    """`python -c … <file descriptor>`: serve, and send what went wrong as an exception."""
    for number in LEFT_TO_THE_EVALUATION:
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except GONE:
        return
    except UserError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"fault in a simulator process\n{traceback.format_exc()}"))
