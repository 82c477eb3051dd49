"""A world and a judge for tests of the rollout: fast, and sensitive to what must not matter."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defi.errors import UserError


@dataclass
class Mishaps:
    """What goes wrong, once (until the file `done` exists): kill, hang, in the chain that starts at `at`."""

    done: Path
    at: float
    kind: str = "kill"
    always: bool = False

    def strike(self, start: float) -> None:
        if start != self.at or (self.done.exists() and not self.always):
            return
        self.done.touch()
        if self.kind == "hang":
            time.sleep(60)
        if self.kind == "raise":
            raise ZeroDivisionError("in the world")
        print("the last words")
        os._exit(9)


class FakeWorld:
    """A chaotic number. Like Bullet's contacts it remembers what ran before a reset; `reload` forgets."""

    def __init__(self, mishaps: Mishaps | None = None) -> None:
        self.mishaps = mishaps
        self.reload()

    def reload(self) -> None:
        self.history = 0.0

    def reset(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        self.x = float(robot_obs[0])
        self.start, self.steps = self.x, 0

    def step(self, action: np.ndarray) -> None:
        assert action[6] in (-1.0, 1.0)
        self.steps += 1
        if self.mishaps and self.steps == 15:
            self.mishaps.strike(self.start)
        self.x = (3.9 * self.x * (1 - self.x) + 0.05 * float(np.sum(action)) + self.history) % 1
        self.history += 1e-9

    def state(self) -> float:
        return self.x

    def render(self) -> dict[str, np.ndarray]:
        shade = np.uint8(255 * self.x)
        return {"rgb_static": np.full((20, 20, 3), shade), "rgb_gripper": np.full((8, 8, 3), shade)}

    def robot_obs(self) -> np.ndarray:
        return np.full(15, self.x)

    def close(self) -> None:
        pass


def judge(task: str, start: float, end: float) -> bool:
    return abs(end - start) < 0.01


def start_of(index: int) -> float:
    return 0.05 + 0.013 * index


def broken_world() -> FakeWorld:
    raise UserError("renderer=egl: no such device; choose cpu")
