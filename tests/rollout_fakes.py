"""A policy and a whole evaluation in the fake world."""

from collections.abc import Callable
from typing import Any

import numpy as np
from fake_world import FakeWorld, judge, start_of

from defi.data.calvin import calvin_robot
from defi.engine.data import seed_of
from defi.sim.renderers import Renderer
from Step3_DeFI.rollout.evaluate import Evaluation
from Step3_DeFI.rollout.fleet import shown
from Step3_DeFI.rollout.protocol import RolloutConfig, short_hash
from Step3_DeFI.rollout.simulator import Agent, ChainSpec, Observation, Setup

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


def policy_agent(ask: Callable[[Observation], np.ndarray]) -> Agent:
    """Acts by what `ask` answers, as a simulator does with the policy's answers."""
    return lambda world, task, words, seed: ask(
        Observation(seed, task, words, world.render(), world.robot_obs())
    )


def ask(policy: FakePolicy, batch: list[Observation]) -> np.ndarray:
    """Its answers to a whole batch, as the rollout asks."""
    return policy.infer_batch([shown(seen) for seen in batch], [seed_of("rollout", *s.seed) for s in batch])


def fake_evaluation(make_world: Callable[[], FakeWorld] = FakeWorld, **settings: object) -> Evaluation:
    """Chains of five tasks in the fake world, from evenly spread starts."""
    config = RolloutConfig(**{"chains": 12, "max_steps": [30, 60], **settings})
    chains = [
        ChainSpec(
            index,
            tuple(np.roll(TASKS, index).tolist()),
            tuple(f"please {task}" for task in np.roll(TASKS, index)),
            np.full(15, start_of(index)),
            np.zeros(24),
        )
        for index in range(config.chains)
    ]
    protocol = {
        "scene": "fake",
        "assets": "builtin",
        "backend": "native",
        "sequences": "subset",
        "sequence_hash": short_hash([chain.tasks for chain in chains]),
        "chains": config.chains,
        "length": 5,
        "max_steps": config.max_steps,
        "instruction_source": "tests",
        "instruction_hash": short_hash([chain.instructions for chain in chains]),
        "world": config.sim.world,
    }
    limit, fresh, every = max(config.max_steps), config.sim.world == "fresh", config.videos.every
    setup = Setup(make_world, judge, seed=config.seed, limit=limit, fresh=fresh, film_every=every)
    return Evaluation(config, protocol, chains, setup, Renderer("cpu", "none"))
