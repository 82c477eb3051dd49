"""A policy and a whole evaluation in the fake world."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from fake_world import FakeWorld, judge, start_of

from defi.benchmarks.benchmark import Agent, Simulation
from defi.benchmarks.calvin.benchmark import Calvin, short_hash
from defi.benchmarks.calvin.environment import Chain, ChainEnvironment
from defi.data.calvin import calvin_robot
from defi.engine.data import seed_of
from Step3_DeFI.rollout.config import RolloutConfig
from Step3_DeFI.rollout.evaluate import Evaluation
from Step3_DeFI.rollout.simulator import Look

TASKS = ("open_drawer", "close_drawer", "turn_on_led", "lift_red_block_table", "push_blue_block_left")


class FakePolicy:
    """Its answers depend on pictures, words, seed, and (as a network's) on the shape and row of the batch."""

    def __init__(self, broken_at: tuple[int, int] | None = None) -> None:
        self.broken_at = broken_at

    robot = calvin_robot()

    def infer_batch(self, observations: list[dict[str, Any]], seeds: list[int]) -> np.ndarray:
        chunks = []
        for row, (seen, seed) in enumerate(zip(observations, seeds)):
            chunk = np.random.default_rng(seed).uniform(-1, 1, (10, 7))
            chunk += seen["images"]["static"].mean() / 255 + len(seen["instruction"]) * 1e-3
            chunk += 1e-7 * row + 1e-6 * len(observations)
            if self.broken_at and seed == seed_of("rollout", 0, *self.broken_at):
                chunk[3, 2] = np.nan
            chunks.append(chunk)
        return np.stack(chunks)


def policy_agent(ask: Callable[[Look], np.ndarray]) -> Agent:
    """Acts by what `ask` answers, as a simulator does with the policy's answers."""
    return lambda environment, seed: ask(Look(seed, environment.task, environment.observe()))


def ask(policy: FakePolicy, batch: list[Look]) -> np.ndarray:
    """Its answers to a whole batch, as the rollout asks."""
    seeds = [seed_of("rollout", *look.seed) for look in batch]
    return policy.infer_batch([look.observation for look in batch], seeds)


@dataclass
class FakeCalvin(Calvin):
    """Chains of five tasks in the fake world, from evenly spread starts."""

    make_world = FakeWorld  # no setting

    def episodes(self, seed: int) -> list[Chain]:
        return [
            Chain(
                index,
                tuple(np.roll(TASKS, index).tolist()),
                tuple(f"please {task}" for task in np.roll(TASKS, index)),
                np.full(15, start_of(index)),
                np.zeros(24),
            )
            for index in range(self.chains)
        ]

    def prepare(self, share: int = 0) -> Simulation:
        limit, fresh = max(self.max_steps), self.sim.world == "fresh"
        return Simulation(
            partial(ChainEnvironment, self.make_world, limit, fresh=fresh, judge=judge), "none", "cpu"
        )

    def protocol(self, episodes: list[Chain], seed: int) -> dict[str, Any]:
        return {
            "scene": "fake",
            "assets": "builtin",
            "backend": "native",
            "sequences": "subset",
            "sequence_hash": short_hash([chain.tasks for chain in episodes]),
            "chains": self.chains,
            "length": 5,
            "max_steps": self.max_steps,
            "instruction_source": "tests",
            "instruction_hash": short_hash([chain.instructions for chain in episodes]),
            "world": self.sim.world,
        }


def fake_evaluation(make_world: Callable[[], FakeWorld] = FakeWorld, **settings: object) -> Evaluation:
    """Chains in the fake world; settings of the benchmark and of the rollout."""
    settings = {"chains": 12, "max_steps": [30, 60], **settings}
    own = {field.name for field in fields(Calvin)}
    benchmark = FakeCalvin(**{key: value for key, value in settings.items() if key in own})
    benchmark.make_world = make_world
    config = RolloutConfig(**{key: value for key, value in settings.items() if key not in own})
    return Evaluation.prepare(benchmark, config)


def fake_environment(**how: Any) -> ChainEnvironment:
    """As the processes of `fake_evaluation` have it."""
    return ChainEnvironment(FakeWorld, 60, judge=judge, **how)
