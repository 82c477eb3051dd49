"""Play: scripted policies solve one task after the other in one world, as CALVIN's play data was recorded.

Disturbed demonstrations follow DART (Laskey et al., 2017): the executed action carries smooth noise, the
recorded one is the policy's answer to where that led, so that who learns from it learns to come back.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from defi.collecting import smooth_noise
from defi.sim.arm import POSITION_STEP, ROTATION_STEP
from defi.sim.judge import BlockState, JudgeState, solved
from defi.sim.scene import BLOCKS
from defi.sim.scripted import ScriptedPolicy
from defi.sim.sequences import initial_states, shortest_path, start_state
from defi.sim.tasks import TASK_TABLE, Situation
from defi.sim.world import World

WANDER = (-10, -4, -2), (10, 2, 4)  # how far the arm may start from the protocol's pose, in steps of 0.02 m
STARTS = 24  # start states from which the shortest way to a task is taken
STAY = np.array([0, 0, 0, 0, 0, 0, 1.0])
REST = 3  # steps after a reset
STEP_SCALE = np.array([POSITION_STEP] * 3 + [ROTATION_STEP] * 3)

# Metres beyond which a door is no longer right (closed), and is left (open). In between only tasks that do
# not depend on it are possible: the judge asks for 0.15 m of slide and 0.12 m of drawer.
SLIDE, DRAWER = (0.05, 0.20), (0.04, 0.16)
SHELF_MIDDLE = -0.085  # x between the two halves behind the sliding door
BACK = 0.05  # y behind which the table's base is the cabinet


@dataclass
class PlayConfig:
    """How tasks are played one after the other; configs/collect.yaml says what each setting is."""

    noise_probability: float
    noise_position: float
    noise_rotation: float
    noise_correlation: float
    reset: float
    random_arm: float
    hold: int
    at_once: float
    max_steps: int
    attempts: int


@dataclass(frozen=True)
class Attempt:
    """One try at a task."""

    task: str
    solved_after: int | None  # steps until the judge first called it solved; None: never
    disturbed: bool
    continues: bool  # its first frame follows the last one of the attempt before, which was solved
    frames: list[dict[str, np.ndarray]]


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
            situation = observe_situation(self.world.state())
            possible = [task for task in self._path[:1] or left if TASK_TABLE[task].outcome(situation)]
            if not possible or (not self._path and self.rng.random() < self.config.reset):
                self._restart(left)
                continue
            self._path = self._path[1:]
            task = str(self.rng.choice(possible))
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
            self.world.step(STAY)
        if self.rng.random() < self.config.random_arm:
            offset = self.rng.uniform(*WANDER)
            steps = int(np.ceil(np.abs(offset).max()))
            gripper = self.rng.choice([-1.0, 1.0])
            for _ in range(steps):
                self.world.step(np.array([*offset / steps, 0, 0, 0, gripper]))

    def _attempt(self, task: str) -> Attempt:
        """Frames up to `hold` steps after success, at times one, or of all of a failure."""
        config, world, before = self.config, self.world, self.world.state()
        disturbed = bool(self.rng.random() < config.noise_probability)
        hold = 1 if self.rng.random() < config.at_once else config.hold
        noise = smooth_noise(config, self.rng)
        policy, frames, solved_after = ScriptedPolicy(task, world), [], None
        left = config.max_steps
        while left > 0 and (action := policy.act(world)) is not None:
            target = np.concatenate([world.arm.target_position, world.arm.target_euler])
            target = np.append(target + action[:6] * STEP_SCALE, action[6])
            observed = {"robot_obs": world.robot_obs(), "scene_obs": world.scene_obs()}
            frames.append(world.render() | {"rel_actions": action, "actions": target} | observed)
            world.step(np.clip(action + next(noise), -1, 1) if disturbed else action)
            left -= 1
            if solved_after is None and solved(task, before, world.state()):
                solved_after, left = len(frames), hold
        return Attempt(task, solved_after, disturbed, self._continues, frames)


def observe_situation(state: JudgeState) -> Situation:
    """What is where, as tasks see it; a door or block that is nowhere in particular: between, elsewhere."""

    def place(block: BlockState) -> str:
        x, y, _ = block.position
        if state.surface("slider") in block.contacts:
            return "slider_left" if x < SHELF_MIDDLE else "slider_right"
        if state.surface("drawer") in block.contacts:
            return "drawer"
        if state.surface("table") in block.contacts:
            return "table" if y < BACK else "elsewhere"
        if block.touching == {state.robot}:
            return "grasped"
        others = {other.body for other in state.blocks.values()}
        return "stacked_top" if block.touching and block.touching <= others else "elsewhere"

    places = {name: place(state.blocks[name]) for name in BLOCKS}
    for top in [name for name, at in places.items() if at == "stacked_top"]:
        for name, block in state.blocks.items():
            if block.body in state.blocks[top].touching and places[name] == "table":
                places[name] = "stacked_bottom"
    slide, drawer = state.doors["base__slide"], state.doors["base__drawer"]
    return {
        "led": state.lights["led"],
        "lightbulb": state.lights["lightbulb"],
        "slider": ("right", "between", "left")[sum(slide > limit for limit in SLIDE)],
        "drawer": ("closed", "between", "open")[sum(drawer > limit for limit in DRAWER)],
        **{f"{name.removeprefix('block_')}_block": at for name, at in places.items()},
        "grasped": int("grasped" in places.values()),
    }
