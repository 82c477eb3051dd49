"""Play: scripted policies solve one task after the other in one world, as CALVIN's play data was recorded.

Disturbed demonstrations follow DART (Laskey et al., 2017): the executed action carries smooth noise, the
recorded one is the policy's answer to where that led, so that who learns from it learns to come back.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from defi.sim.arm import POSITION_STEP, ROTATION_STEP
from defi.sim.collect.config import PlayConfig
from defi.sim.judge import solved
from defi.sim.scripted import ScriptedPolicy
from defi.sim.sequences import initial_states, shortest_path, start_state
from defi.sim.situation import observe_situation
from defi.sim.tasks import TASK_TABLE
from defi.sim.world import World

WANDER = (-10, -4, -2), (10, 2, 4)  # how far the arm may start from the protocol's pose, in steps of 0.02 m
STARTS = 24  # start states from which the shortest way to a task is taken
REST = 3  # steps after a reset
STEP_SCALE = np.array([POSITION_STEP] * 3 + [ROTATION_STEP] * 3)

Frame = dict[str, np.ndarray]


@dataclass(frozen=True)
class Attempt:
    """One try at a task.

    solved_after: steps until the judge first called it solved; None: never.
    continues: whether its first frame follows the last one of the attempt before, which was solved.
    """

    task: str
    solved_after: int | None
    disturbed: bool
    continues: bool
    frames: list[Frame]

    def summary(self) -> dict[str, str | int | bool | None]:
        """For JSON files: everything but the frames themselves."""
        known = {"task": self.task, "solved_after": self.solved_after, "disturbed": self.disturbed}
        return known | {"steps": len(self.frames)}


class Player:
    """Plays tasks in one world, loaded and in any state; other tasks make them possible where needed."""

    def __init__(self, world: World, config: PlayConfig, rng: np.random.Generator) -> None:
        self.world, self.config, self.rng = world, config, rng
        self._path: Sequence[str] = ()
        self._continues = False

    def play(self, goals: Sequence[str]) -> Iterator[Attempt]:
        """Every attempt until each of `goals` is solved, in an order that the world allows, or given up."""
        left, failures = list(goals), Counter()
        self._restart(left)
        while left:
            task = self._choose(left)
            attempt = self._attempt(task)
            yield attempt
            self._continues = attempt.solved_after is not None
            if self._continues:
                if task in left:
                    left.remove(task)
                continue
            self._path = ()
            failures[task] += 1
            if failures[task] >= self.config.attempts:
                left = [other for other in left if other != task]

    def _choose(self, left: Sequence[str]) -> str:
        """The next task of the path, or one of those left; after a restart now and then, or at a dead end."""
        while True:
            situation = observe_situation(self.world.state())
            possible = [task for task in self._path[:1] or left if TASK_TABLE[task].outcome(situation)]
            if possible and (self._path or self.rng.random() >= self.config.reset):
                self._path = self._path[1:]
                return str(self.rng.choice(possible))
            self._restart(left)

    def _restart(self, left: Sequence[str]) -> None:
        """A start of the protocol near one of the tasks left, and the path to it; at times the arm moved."""
        goal, ways = str(self.rng.choice(left)), []
        while not ways:
            states = self.rng.choice(initial_states(), STARTS, replace=False)
            ways = [(state, path) for state in states if (path := shortest_path(state, goal))]
        state, self._path = min(ways, key=lambda way: len(way[1]))
        self._continues = False
        self.world.reset(*start_state(state))
        for _ in range(REST):
            self.world.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        if self.rng.random() < self.config.random_arm:
            offset = self.rng.uniform(*WANDER)
            steps = int(np.ceil(np.abs(offset).max()))
            gripper = self.rng.choice([-1.0, 1.0])
            for _ in range(steps):
                self.world.step(np.array([*offset / steps, 0, 0, 0, gripper]))

    def _attempt(self, task: str) -> Attempt:
        """Frames up to `hold` steps after success, at times one, or of the whole failure."""
        config, world, before = self.config, self.world, self.world.state()
        disturbed = bool(self.rng.random() < config.noise_probability)
        hold = 1 if self.rng.random() < config.at_once else config.hold
        noise = smooth_noise(config, self.rng)
        policy, frames, solved_after = ScriptedPolicy(task, world), [], None
        left = config.max_steps
        while left > 0 and (action := policy.act(world)) is not None:
            frames.append(observe(world, action))
            world.step(np.clip(action + next(noise), -1, 1) if disturbed else action)
            left -= 1
            if solved_after is None and solved(task, before, world.state()):
                solved_after, left = len(frames), hold
        return Attempt(task, solved_after, disturbed, self._continues, frames)


def smooth_noise(config: PlayConfig, rng: np.random.Generator) -> Iterator[Float64[np.ndarray, "7"]]:
    """First-order autoregressive noise on the pose, of a random size; the gripper is left alone."""
    sigma = np.array([config.noise_position] * 3 + [config.noise_rotation] * 3 + [0.0])
    sigma *= rng.uniform()
    kept = config.noise_correlation
    noise = sigma * rng.normal(size=7)
    while True:
        yield noise
        noise = kept * noise + np.sqrt(1 - kept**2) * sigma * rng.normal(size=7)


def observe(world: World, action: Float64[np.ndarray, "7"]) -> Frame:
    """A frame: what the world looks like, and the (relative) action taken there."""
    target = np.concatenate([world.arm.target_position, world.arm.target_euler]) + action[:6] * STEP_SCALE
    return {
        **world.render(),
        "rel_actions": action,
        "actions": np.append(target, action[6]),
        "robot_obs": world.robot_obs(),
        "scene_obs": world.scene_obs(),
    }
