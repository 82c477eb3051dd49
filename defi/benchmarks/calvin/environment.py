"""A chain of tasks in one play table: tasks one after the other, until one is not solved in time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from defi.benchmarks.benchmark import Actions, Environment, Episode, Observation, Outcome, Seed, Step
from defi.sim.judge import solved
from defi.sim.tasks import Situation

Judge = Callable[[str, Any, Any], bool]  # (task, state at its start, state now) → solved?


@dataclass(frozen=True)
class Chain(Episode):
    """Tasks to solve one after the other, how they are asked for, and where the world starts."""

    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    robot_obs: Float[np.ndarray, "15"]
    scene_obs: Float[np.ndarray, "24"]
    initial_state: Situation = field(default_factory=dict)


class ChainEnvironment(Environment):
    """Judged after every step.

    Args:
        make_world: returns a `defi.sim.world.World`, or something that behaves like one.
        limit: control steps per task.
        fresh: load the world again before each chain. Bullet's contact order remembers what ran before in the
            same world, so only then does a chain not depend on those before it.
    """

    def __init__(
        self, make_world: Callable[[], Any], limit: int, *, fresh: bool = True, judge: Judge = solved
    ) -> None:
        self.world, self.limit, self.fresh, self.judge = make_world(), limit, fresh, judge
        self._used = False

    def reset(self, episode: Chain) -> None:
        if self._used and self.fresh:
            self.world.reload()
        self._used, self.chain, self.steps = True, episode, []
        self.world.reset(episode.robot_obs, episode.scene_obs)
        self._begin(self.world.state())

    def _begin(self, state: Any) -> None:
        """The next task of the chain, from here."""
        self._start, self._taken, self._place = state, 0, len(self.steps)
        self.task = self.chain.tasks[self._place]

    def observe(self) -> Observation:
        return {
            "images": {key.removeprefix("rgb_"): picture for key, picture in self.world.render().items()},
            "instruction": self.chain.instructions[self._place],
            "state": self.world.robot_obs(),
        }

    def step(self, action: Float[np.ndarray, "7"]) -> Step:
        action = np.array(action, dtype=np.float64)
        action[6] = 1.0 if action[6] > 0 else -1.0  # the gripper opens, or closes
        self.world.step(action)
        self._taken += 1
        state = self.world.state()
        done = self.judge(self.task, self._start, state)
        if not done and self._taken < self.limit:
            return Step()
        self.steps.append(self._taken if done else None)
        if not done or len(self.steps) == len(self.chain.tasks):
            return Step(over=True, solved=done)
        self._begin(state)
        return Step(look=True, solved=True)

    def outcome(self) -> Outcome:
        """`steps`: the control steps per attempted task, None where it was not solved."""
        return {"tasks": list(self.chain.tasks), "steps": list(self.steps)}

    def close(self) -> None:
        self.world.close()


def act_at_random(environment: ChainEnvironment, seed: Seed) -> Actions:
    """Uniform actions in [-1, 1], the gripper at random per chunk of 10: what chance alone achieves."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (10, 7))
    actions[:, 6] = actions[0, 6]
    return actions


class ScriptedAgent:
    """The scripted policy of each task, which sees the true state: what the table itself allows."""

    begun = None

    def __call__(self, environment: ChainEnvironment, seed: Seed) -> Actions:
        from defi.sim.scripted import ScriptedPolicy

        world, now = environment.world, (seed[1], environment.task)
        if self.begun != now:
            self.begun, self.policy = now, ScriptedPolicy(environment.task, world)
        action = self.policy.act(world)
        waiting = [0, 0, 0, 0, 0, 0, world.arm.gripper_action]  # where it is done, as far as it can tell
        return np.array([waiting if action is None else action], dtype=np.float64)
