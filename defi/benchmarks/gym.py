"""Any environment of gymnasium as a benchmark: `benchmark=gym env=gym_pusht/PushT-v0`.

configs/benchmark/gym.yaml says what each setting is for. gymnasium is not a requirement.
"""

import contextlib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from defi.benchmarks.benchmark import About, Benchmark, Environment, Episode, Observation, Outcome, Step
from defi.errors import UserError, one_line
from defi.robot.spec import Robot, Vector

RENDER = "render"  # as a camera's key: what the environment draws for people


@dataclass(frozen=True)
class Trial(Episode):
    """One reset with a seed of its own."""

    seed: int


@dataclass
class Gym(Benchmark):
    """The same environment, reset with different seeds."""

    env: str | None = None
    trials: int = 50
    options: dict[str, Any] | None = None
    cameras: dict[str, str] | None = None
    state: str | None = None
    instruction: str = ""
    success: str = "is_success"
    max_steps: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.env is None:
            raise UserError("env=: not given; name an environment of gymnasium, such as gym_pusht/PushT-v0")
        for key in ("trials", "max_steps"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be 1 or more")

    def make(self) -> Any:
        """The environment as gymnasium has it."""
        try:
            import gymnasium
        except ImportError:
            raise UserError("benchmark=gym: needs gymnasium; pip install gymnasium") from None
        namespace, slash, _ = self.env.partition("/")
        if slash and ":" not in self.env:  # such packages register their environments when imported
            with contextlib.suppress(ImportError):
                importlib.import_module(namespace)
        options = dict(self.options or {})
        if RENDER in (self.cameras or {}).values():
            options |= {"render_mode": "rgb_array"}
        try:
            return gymnasium.make(self.env, max_episode_steps=self.max_steps, **options)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise UserError(f"env={self.env}: {one_line(error)}") from error

    def environment(self) -> "GymEnvironment":
        return GymEnvironment(self.make(), self)

    @cached_property
    def robot(self) -> Robot:
        """As the spaces of actions and observations have it; nobody says what their numbers are."""
        env = self.make()
        try:
            space, (seen, _) = env.action_space, env.reset(seed=0)
            pictures, state = self.views(seen, env), self.numbers(seen)
        finally:
            env.close()
        if len(getattr(space, "shape", None) or ()) != 1 or not np.issubdtype(space.dtype, np.floating):
            raise UserError(f"env={self.env}: its actions are {space}; a list of real numbers is needed")
        limited = np.isfinite(space.low).all() and np.isfinite(space.high).all()
        ends = {"low": space.low.tolist(), "high": space.high.tolist()} if limited else {}
        actions = Vector.plain([f"action_{i}" for i in range(space.shape[0])], **ends)
        names = [f"state_{i}" for i in range(0 if state is None else len(state))]
        return Robot(list(pictures), actions, Vector.plain(names) if names else None, fps=self.fps)

    def views(self, seen: Any, env: Any) -> dict[str, np.ndarray]:
        """A picture per camera: of `cameras`, or where none is named every picture in the observation."""
        found = dict(leaves(seen))
        if not self.cameras:
            pictures = {key.replace(".", "_") or "camera": each for key, each in found.items() if drawn(each)}
        else:
            shots = {RENDER: env.render} | {key: lambda key=key: found[key] for key in found}
            if wrong := set(self.cameras.values()) - shots.keys():
                raise UserError(
                    f"cameras: no {min(wrong)} in the observation; choose from {', '.join(shots)}"
                )
            pictures = {camera: shots[key]() for camera, key in self.cameras.items()}
        if not pictures or not all(map(drawn, pictures.values())):
            there = ", ".join(f"{key or 'all'} {np.shape(each)}" for key, each in found.items())
            fix = "name uint8 pictures as cameras={camera: key}, or cameras={camera: render}"
            raise UserError(f"env={self.env}: no pictures in its observation ({there}); {fix}")
        return pictures

    def numbers(self, seen: Any) -> Float[np.ndarray, " S"] | None:
        """The state, if it is asked for."""
        if self.state is None:
            return None
        found = dict(leaves(seen))
        if self.state not in found:
            raise UserError(f"state={self.state}: not in the observation; choose from {', '.join(found)}")
        return np.asarray(found[self.state], np.float64).ravel()

    def episodes(self, seed: int) -> list[Trial]:
        seeds = np.random.SeedSequence(seed).generate_state(self.trials)
        return [Trial(index, int(each)) for index, each in enumerate(seeds)]

    @property
    def scores(self) -> Sequence[str]:
        return ("reward", "best reward", "ever", "success")

    def value(self, outcome: Outcome, score: str) -> float:
        return outcome[score.replace(" ", "_")]

    def about(self, protocol: Mapping[str, Any], seed: int) -> About:
        about = super().about(protocol, seed)
        about.title = f"{protocol['episodes']} episodes of {protocol['env']}, seed {seed}"
        about.figure, about.headline, about.percent = "average", "success rate", ["ever", "success"]
        about.note += (
            " success: at the last step; ever: at any step."
            " reward: the sum of all steps; best reward: the largest of a step."
        )
        return about


class GymEnvironment(Environment):
    """One environment of gymnasium."""

    def __init__(self, env: Any, benchmark: Gym) -> None:
        self.env, self.benchmark = env, benchmark
        self.task = benchmark.env.split("/")[-1].split(":")[-1]

    def reset(self, episode: Trial) -> None:
        self._seen, _ = self.env.reset(seed=episode.seed)
        self._rewards: list[float] = []
        self._success: list[bool] = []

    def observe(self) -> Observation:
        shown = {
            "images": self.benchmark.views(self._seen, self.env),
            "instruction": self.benchmark.instruction,
        }
        state = self.benchmark.numbers(self._seen)
        return shown if state is None else shown | {"state": state}

    def step(self, action: Float[np.ndarray, " A"]) -> Step:
        space = self.env.action_space
        action = np.clip(action, space.low, space.high).astype(space.dtype)
        self._seen, reward, terminated, truncated, info = self.env.step(action)
        self._rewards.append(float(reward))
        if self.benchmark.success not in info:
            fix = f"choose from {', '.join(info)}" if info else "its environment says nothing there"
            raise UserError(f"success={self.benchmark.success}: not in the environment's info; {fix}")
        self._success.append(bool(info[self.benchmark.success]))
        return Step(over=terminated or truncated, solved=self._success[-1])

    def outcome(self) -> Outcome:
        return {
            "task": self.task,
            "success": self._success[-1],
            "ever": any(self._success),
            "reward": sum(self._rewards),
            "best_reward": max(self._rewards),
        }

    def close(self) -> None:
        self.env.close()


def drawn(value: Any) -> bool:
    """Whether it is a picture."""
    return getattr(value, "dtype", None) == np.uint8 and value.ndim == 3 and value.shape[2] == 3


def leaves(seen: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """All that lies in nested dicts, under keys with dots."""
    if not isinstance(seen, Mapping):
        yield key, seen
        return
    for name, value in seen.items():
        yield from leaves(value, f"{key}.{name}" if key else str(name))
