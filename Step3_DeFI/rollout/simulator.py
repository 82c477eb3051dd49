"""A simulator process: episodes come in, observations and results go out, over one connection.

An episode runs in one environment: observe, act, step, until it is over. Nothing here needs PyTorch, so a
process starts fast and stays small. `fleet.Simulator` starts it; it ends when the other side of the
connection is closed, so none is left behind when the evaluation is killed.
"""

import itertools
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from jaxtyping import UInt8

from defi.benchmarks.adapters import Action, adapt
from defi.benchmarks.benchmark import Actions, Agent, Environment, Episode, Observation, Seed, Step, name_of
from defi.errors import Fault, UserError, one_line
from defi.robot.spec import Robot

GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # the other side of a connection


@dataclass(frozen=True)
class Look:
    """What the policy is shown, while `task` is asked for. Its noise depends on `seed` alone."""

    seed: Seed
    task: str
    observation: Observation


@dataclass(frozen=True)
class Clip:
    """Pictures of one attempt at a task, by camera: uint8 [F,H,W,3]."""

    episode: int
    position: int
    task: str
    instruction: str
    solved: bool
    images: Mapping[str, UInt8[np.ndarray, "F H W 3"]]


@dataclass(frozen=True)
class EpisodeResult:
    """A finished episode: what its environment says came of it, and what it took."""

    index: int
    outcome: Mapping[str, Any]
    control_steps: int
    observations: int
    seconds: float


@dataclass(frozen=True)
class Setup:
    """What a simulator process gets first."""

    make: Callable[[], Environment]
    seed: int
    robot: Robot  # the benchmark's
    name: str = "policy"  # of the agent
    agent: Agent | None = None  # acts in this process; None: the policy is asked over the connection
    adapters: Sequence[str] = ()  # what is done to its actions
    filmed: int = 0  # so many episodes, the first, are filmed, a picture every `film_every` control steps
    film_every: int = 3
    variables: Mapping[str, str] = field(default_factory=dict)  # of the process's environment


def run_episode(
    environment: Environment, agent: Agent, episode: Episode, setup: Setup
) -> Iterator[Clip | EpisodeResult]:
    """Run an episode to its end: a clip of each attempt, if it is filmed, then the result."""
    began, taken, step = time.perf_counter(), 0, Step()
    seeds = ((setup.seed, episode.index, observation) for observation in itertools.count())
    film = setup.film_every if episode.index < setup.filmed else 0
    environment.reset(episode)
    act = adapt(setup.adapters)

    def chunk(seed: Seed) -> Iterator[Action]:
        actions, names = agent(environment, seed), setup.robot.actions.names
        shape = np.shape(actions)
        if len(shape) != 2 or shape[1] != len(names) or not shape[0]:
            takes = f"the benchmark's robot takes [K, {len(names)}] ({', '.join(names)})"
            raise UserError(f"agent={setup.name}: gave actions {list(shape)}; {takes}")
        return act(actions)

    for position in itertools.count():
        task, seen = environment.task, observe(environment, setup, first=not position) if film else {}
        step, steps, frames = attempt(environment, chunk, seeds, film)
        taken += steps
        if film:
            frames = [seen["images"], *frames]
            images = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
            yield Clip(episode.index, position, task, seen["instruction"], step.solved, images)
        if step.over:
            break
    yield EpisodeResult(
        index=episode.index,
        outcome=json.loads(json.dumps(environment.outcome(), default=np.generic.item)),  # NumPy's as Python's
        control_steps=taken,
        observations=next(seeds)[2],
        seconds=time.perf_counter() - began,
    )


def observe(environment: Environment, setup: Setup, *, first: bool) -> Observation:
    """What it shows; the first one of an episode is held to the benchmark's robot."""
    seen = environment.observe()
    if first:
        try:
            setup.robot.check(seen, state=True)
        except UserError as error:
            raise UserError(f"{name_of(type(environment))}: {error}") from None
    return seen


def attempt(
    environment: Environment, act: Callable[[Seed], Iterable[Action]], seeds: Iterator[Seed], film: int = 0
) -> tuple[Step, int, list[Mapping[str, UInt8[np.ndarray, "H W 3"]]]]:
    """Act until the episode is over or something else is asked for. The rest of a chunk is not executed then.

    Returns:
        The last step, the number of control steps, and the pictures after every `film`-th and the last.
    """
    taken, frames = 0, []
    while True:
        for action in act(next(seeds)):
            step = environment.step(action)
            if not isinstance(step, Step):
                returned = f"step returned {type(step).__name__}"
                raise UserError(
                    f"{name_of(type(environment))}: {returned}; give a Step, also while it goes on"
                )
            taken += 1
            ended = step.over or step.look
            if film and (ended or taken % film == 0):
                frames.append(environment.observe()["images"])
            if ended:
                return step, taken, frames


def describe(error: Exception) -> Fault:
    """A fault with its traceback from the call on: what is above it is not the benchmark's."""
    trace: Any = error.__traceback__
    while trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace)
    return Fault(
        "".join(lines), f"{trace.tb_frame.f_code.co_name}: {type(error).__name__}: {one_line(error)}"
    )


def main() -> None:
    """`python -c … <file descriptor>`: run episodes that arrive; send what goes wrong, as an exception."""
    # Ctrl-C and what Slurm sends reach every process of a run; the evaluation decides what becomes of them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))

    def ask_policy(environment: Environment, seed: Seed) -> Actions:
        seen = observe(environment, setup, first=seed[2] == 0)
        connection.send(Look(seed, environment.task, seen))
        return connection.recv()

    try:
        setup: Setup = connection.recv()
        with closing(setup.make()) as environment:
            while True:
                episode = connection.recv()
                for message in run_episode(environment, setup.agent or ask_policy, episode, setup):
                    connection.send(message)
    except GONE:
        return
    except UserError as error:
        connection.send(error)
    except Exception as error:
        connection.send(describe(error))
