"""Play: experts solve one task after the other in one world, and every step is recorded.

Disturbed demonstrations follow DART (Laskey et al., 2017): the executed action carries smooth noise, the
recorded one is the expert's answer to where that led, so that a policy learns to come back.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from defi.calvin import Span, encode_frame
from defi.sim.arm import POSITION_STEP, ROTATION_STEP
from defi.sim.experts import Expert
from defi.sim.judge import solved
from defi.sim.sequences import initial_states, start_state
from defi.sim.situation import observe_situation
from defi.sim.tasks import TASK_TABLE, Situation
from defi.sim.world import World

SEARCH_DEPTH = 3  # tasks in a row, the last one wanted, the others played to make it possible
WANDER = (-10, -4, -2), (10, 2, 4)  # how far the arm may start from the protocol's pose, in steps of 0.02 m
STARTS = 24  # start states looked at for the shortest way to a task
REST = 3  # steps after a reset
STEP_SCALE = np.array([POSITION_STEP] * 3 + [ROTATION_STEP] * 3)

Frame = dict[str, np.ndarray]


@dataclass(frozen=True)
class PlaySettings:
    """How demonstrations are played; see configs/collect.yaml."""

    noise_probability: float  # of a demonstration to be disturbed
    noise_position: float  # largest standard deviation, in units of an action
    noise_rotation: float
    noise_correlation: float  # from step to step
    reset: float  # probability that a demonstration starts from a new state of the world
    random_arm: float  # share of those with the arm away from the protocol's pose
    hold: int  # frames recorded from success on
    at_once: float  # probability that it is only one
    max_steps: int
    attempts: int  # failures of a task in one world before it is given up there


@dataclass(frozen=True)
class Attempt:
    """One try at a task, for the manifest."""

    task: str
    solved: bool
    steps: int
    disturbed: bool


@dataclass
class Record:
    """What was written: frames counted from 0, recordings and spans in these numbers."""

    frames: int = 0
    episodes: list[tuple[int, int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "Record":
        return cls(
            data["frames"],
            [tuple(ends) for ends in data["episodes"]],
            [Span(**span) for span in data["spans"]],
            [Attempt(**attempt) for attempt in data["attempts"]],
        )


class Recorder:
    """Writes frames as `000000.npz`, `000001.npz`, … and keeps the record of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record, self._start = folder, Record(), 0

    def add(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            (self.folder / unit_frame(self.record.frames)).write_bytes(encode_frame(frame))
            self.record.frames += 1

    def end_episode(self) -> None:
        """The next frame begins a new recording."""
        if self.record.frames > self._start:
            self.record.episodes.append((self._start, self.record.frames - 1))
        self._start = self.record.frames


def unit_frame(index: int) -> str:
    return f"{index:06d}.npz"


def path_to(situation: Situation, goals: Sequence[str], available: Sequence[str]) -> list[str] | None:
    """The fewest tasks that lead from `situation` to one of `goals`, which ends them; None: no way."""
    queue: deque[tuple[Situation, list[str]]] = deque([(situation, [])])
    while queue:
        now, path = queue.popleft()
        for task in goals:
            if TASK_TABLE[task].outcome(now) is not None:
                return [*path, task]
        if len(path) + 1 < SEARCH_DEPTH:
            after = ((TASK_TABLE[task].outcome(now), task) for task in available)
            queue.extend((then, [*path, task]) for then, task in after if then is not None)
    return None


def smooth_noise(settings: PlaySettings, rng: np.random.Generator) -> Iterator[Float64[np.ndarray, "7"]]:
    """First-order autoregressive noise on the pose, of a random size; the gripper is left alone."""
    sigma = np.array([settings.noise_position] * 3 + [settings.noise_rotation] * 3 + [0.0])
    sigma *= rng.uniform()
    kept = settings.noise_correlation
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


class Player:
    """Plays tasks in one world and records them.

    Args:
        world: loaded, in any state.
        phrasings: task -> instructions to choose from, for the tasks that are annotated.
        available: tasks that may be played to make another one possible.
    """

    def __init__(
        self,
        world: World,
        recorder: Recorder,
        *,
        phrasings: dict[str, Sequence[str]],
        available: Sequence[str],
        settings: PlaySettings,
        rng: np.random.Generator,
    ) -> None:
        self.world, self.recorder, self.settings, self.rng = world, recorder, settings, rng
        self.phrasings, self.available = phrasings, available
        self._plan: list[str] = []

    def play(self, goals: Sequence[str]) -> Record:
        """Demonstrate every task of `goals`, in an order that the world allows, or give it up."""
        left = list(goals)
        failures = Counter()
        self._restart(left)
        while left:
            task = self._choose(left)
            if self._demonstrate(task):
                if task in left:
                    left.remove(task)
                continue
            self._plan = []
            failures[task] += 1
            if failures[task] >= self.settings.attempts:
                left = [other for other in left if other != task]
        self.recorder.end_episode()
        return self.recorder.record

    def _choose(self, left: Sequence[str]) -> str:
        """What the plan says, or one of the tasks left; after a new start now and then, or at a dead end."""
        while True:
            situation = observe_situation(self.world.state())
            possible = [task for task in self._plan[:1] or left if TASK_TABLE[task].outcome(situation)]
            if possible and (self._plan or self.rng.random() >= self.settings.reset):
                self._plan = self._plan[1:]
                return str(self.rng.choice(possible))
            self._restart(left)

    def _restart(self, left: Sequence[str]) -> None:
        """A start of the protocol near one of the tasks left, and the plan for it; at times the arm moved."""
        self.recorder.end_episode()
        goal, ways = [str(self.rng.choice(left))], []
        while not ways:
            states = self.rng.choice(initial_states(), STARTS, replace=False)
            ways = [(state, path_to(state, goal, self.available)) for state in states]
            ways = [(state, path) for state, path in ways if path is not None]
        state, self._plan = min(ways, key=lambda way: len(way[1]))
        self.world.reset(*start_state(state))
        self._rest()
        if self.rng.random() < self.settings.random_arm:
            self._wander()

    def _rest(self) -> None:
        """Let the blocks come to rest, unrecorded."""
        for _ in range(REST):
            self.world.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))

    def _wander(self) -> None:
        """Move the arm above the table, unrecorded."""
        offset = self.rng.uniform(*WANDER)
        steps = int(np.ceil(np.abs(offset).max()))
        gripper = self.rng.choice([-1.0, 1.0])
        for _ in range(steps):
            self.world.step(np.array([*offset / steps, 0, 0, 0, gripper]))

    def _demonstrate(self, task: str) -> bool:
        """Let the expert try `task`; keep the frames if the judge calls it solved."""
        settings, rng = self.settings, self.rng
        disturbed = bool(rng.random() < settings.noise_probability)
        noise = smooth_noise(settings, rng) if disturbed else None
        hold = 1 if rng.random() < settings.at_once else settings.hold
        frames, success = self._run_expert(task, noise, hold)
        self.recorder.record.attempts.append(Attempt(task, success, len(frames), disturbed))
        if not success:
            self.recorder.end_episode()
            return False
        start = self.recorder.record.frames
        self.recorder.add(frames)
        if task in self.phrasings:
            instruction = str(rng.choice(self.phrasings[task]))
            span = Span(start, start + len(frames) - 1, instruction, task)
            self.recorder.record.spans.append(span)
        return True

    def _run_expert(
        self, task: str, noise: Iterator[Float64[np.ndarray, "7"]] | None, hold: int
    ) -> tuple[list[Frame], bool]:
        """Frames up to `hold` steps after success (or of the whole failure), and whether it succeeded."""
        world, before = self.world, self.world.state()
        expert = Expert(task, world)
        frames: list[Frame] = []
        left = self.settings.max_steps
        success = False
        while left > 0 and (action := expert.act(world)) is not None:
            frames.append(observe(world, action))
            world.step(action if noise is None else np.clip(action + next(noise), -1, 1))
            left -= 1
            if not success and solved(task, before, world.state()):
                success, left = True, hold
        return frames, success
