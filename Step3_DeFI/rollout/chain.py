"""One chain of tasks in one world: look, act, judge, until a task is not solved in time."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from Step3_DeFI.rollout.messages import Actions, ChainResult, Clip, Judge, Look, Trial


class Agent(Protocol):
    """Chooses the next actions in a world."""

    looks: int

    def begin(self, trial: Trial) -> None:
        """A new chain starts."""

    def act(self, world: Any, task: str, instruction: str) -> Actions:
        """The next actions, to be executed before the agent is asked again."""


class PolicyAgent:
    """Shows the world to a policy elsewhere: `ask` sends a look and returns its chunk of actions."""

    def __init__(self, ask: Callable[[Look], Actions], seed: int) -> None:
        self.ask, self.seed = ask, seed

    def begin(self, trial: Trial) -> None:
        self.chain, self.looks = trial.index, 0

    def act(self, world: Any, task: str, instruction: str) -> Actions:
        seed = (self.seed, self.chain, self.looks)
        self.looks += 1
        return self.ask(Look(seed, task, instruction, world.render()))


class RandomAgent:
    """Uniform actions in [-1, 1], the gripper at random per chunk: what chance alone achieves."""

    CHUNK = 10

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def begin(self, trial: Trial) -> None:
        self.chain, self.looks = trial.index, 0

    def act(self, world: Any, task: str, instruction: str) -> Actions:
        rng = np.random.default_rng((self.seed, self.chain, self.looks))
        self.looks += 1
        actions = rng.uniform(-1, 1, (self.CHUNK, 7))
        actions[:, 6] = actions[0, 6]
        return actions


class ExpertAgent:
    """The scripted expert of each task, which sees the true state: what the table itself allows."""

    def begin(self, trial: Trial) -> None:
        self.looks, self.task = 0, None

    def act(self, world: Any, task: str, instruction: str) -> Actions:
        from defi.sim.scripted import ScriptedPolicy

        self.looks += 1
        if self.task != task:
            self.task, self.expert = task, ScriptedPolicy(task, world)
        action = self.expert.act(world)
        if action is None:  # done, by its own judgement: wait
            action = np.array([0, 0, 0, 0, 0, 0, world.arm.gripper_action])
        return np.asarray(action, dtype=np.float64)[None]


class Recorder:
    """Keeps pictures of an attempt: the first state, every `every`-th step, and the last."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.frames: list[Mapping[str, UInt8[np.ndarray, "H W 3"]]] = []

    def record(self, world: Any, step: int, *, last: bool = False) -> None:
        if last or step % self.every == 0:
            self.frames.append(world.render())

    def images(self) -> dict[str, UInt8[np.ndarray, "F H W 3"]]:
        return {name: np.stack([frame[name] for frame in self.frames]) for name in self.frames[0]}


def binarise(action: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
    """The gripper opens (+1) on positive values and closes (-1) otherwise."""
    action = np.array(action, dtype=np.float64)
    action[6] = 1.0 if action[6] > 0 else -1.0
    return action


def attempt(
    world: Any,
    judge: Judge,
    agent: Agent,
    task: str,
    instruction: str,
    *,
    limit: int,
    recorder: Recorder | None = None,
) -> int | None:
    """Try one task for at most `limit` control steps; judged after every step.

    Returns:
        The control steps it took, or None. What is left of a chunk when the task is solved is not executed.
    """
    start = world.state()
    taken = 0
    if recorder:
        recorder.record(world, 0)
    while taken < limit:
        for action in agent.act(world, task, instruction)[: limit - taken]:
            world.step(binarise(action))
            taken += 1
            solved = judge(task, start, world.state())
            if recorder:
                recorder.record(world, taken, last=solved)
            if solved:
                return taken
    return None


def run_chain(
    world: Any,
    judge: Judge,
    agent: Agent,
    trial: Trial,
    *,
    limit: int,
    record_every: int | None = None,
    keep: Callable[[Clip], None] | None = None,
) -> ChainResult:
    """Run a chain to its first unsolved task. With `record_every`, clips of its attempts go to `keep`."""
    began = time.perf_counter()
    agent.begin(trial)
    world.reset(trial.robot_obs, trial.scene_obs)
    steps: list[int | None] = []
    for position, (task, instruction) in enumerate(zip(trial.tasks, trial.instructions)):
        recorder = Recorder(record_every) if record_every else None
        steps.append(attempt(world, judge, agent, task, instruction, limit=limit, recorder=recorder))
        if recorder and keep:
            solved = steps[-1] is not None
            keep(Clip(trial.index, position, task, instruction, solved, recorder.images()))
        if steps[-1] is None:
            break
    return ChainResult(
        index=trial.index,
        tasks=trial.tasks,
        steps=tuple(steps),
        control_steps=sum(limit if taken is None else taken for taken in steps),
        looks=agent.looks,
        seconds=time.perf_counter() - began,
    )
