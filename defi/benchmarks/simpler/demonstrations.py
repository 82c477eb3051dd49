"""Demonstrations of SIMPLER's tasks, each a function of seed, task and number alone, in a file of its own.

Physics comes first. Pictures are drawn afterwards, at the places where everything was, of successes alone: a
picture takes four times as long as a step. Disturbed demonstrations follow DART (Laskey et al., 2017): the
executed action carries smooth noise, the recorded one is the policy's answer to where that led.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from defi.benchmarks.simpler.benchmark import STATES, Google, WidowX
from defi.benchmarks.simpler.environment import Moment, Simpler
from defi.benchmarks.simpler.episodes import TASKS, episodes
from defi.benchmarks.simpler.episodes import Episode as Start
from defi.benchmarks.simpler.scripted import scripted
from defi.benchmarks.simpler.starts import random_start
from defi.collecting import NOISE, NOT_NEGATIVE, POSITIVE, check_ranges, smooth_noise
from defi.data.convert import writer_class
from defi.data.episode import Dataset, Episode, Frames, share_of
from defi.data.motions import Motions
from defi.engine.output import write_file
from defi.errors import UserError, choose, reading
from defi.picture import decode_picture, encode_picture, stack_frames
from defi.robot.spec import Robot

FOLDER = ".demonstrations"
UNITS = np.array([0.02] * 3 + [0.05] * 3 + [1.0])  # of the noise: m, rad
BENCHMARKS = {"widowx": WidowX, "google": Google}
COUNTS = ("workers", "demos_per_task", "attempts", "max_steps", "hold")
RANGES = dict.fromkeys(COUNTS, POSITIVE) | {"seed": NOT_NEGATIVE} | NOISE
DISTURBED = 0.6  # of the demonstrations, where no setting says
FIX = "delete this file, then continue with resume=true"


@dataclass
class CollectConfig:
    """Settings of `python -m defi.benchmarks.simpler.collect`, checked; configs/collect_simpler.yaml says
    what each one is."""

    seed: int
    output: str
    resume: bool
    overwrite: bool
    workers: int | None
    simpler_root: str
    record: bool
    format: str
    pictures: str
    image_size: list[int] | None
    tasks: list[str]
    starts: str
    demos_per_task: int
    held_out: float
    attempts: int
    max_steps: int | None
    hold: int
    noise_probability: float | None
    noise_position: float
    noise_rotation: float
    noise_correlation: float

    def __post_init__(self) -> None:
        for task in self.tasks:
            choose("tasks", task, TASKS)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"tasks={self.tasks}: name one or more, none of them twice")
        choose("format", self.format, ("lerobot", "rlds"))
        choose("starts", self.starts, ("random", "official"))
        check_ranges(self, RANGES)
        if self.noise_probability is None:
            self.noise_probability = DISTURBED if self.starts == "random" else 0.0
        if self.record and self.starts == "official":
            why = "these are what policies are tried on, not trained"
            raise UserError(f"starts=official: {why}; only success rates are had from them: record=false")
        if self.record and len({TASKS[task].robot_kind for task in self.tasks}) > 1:
            raise UserError("tasks: of two robots, with other cameras and state; collect a data set of each")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise UserError(f"image_size={self.image_size}: must be [width, height], or null for all pixels")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out={self.held_out}: must be a share from 0 to less than 1")
        if self.record:
            self._check_writing()

    def _check_writing(self) -> None:
        """What the writer would refuse in the end."""
        choose("pictures", self.pictures, writer_class(self.format).forms)
        if (
            self.pictures not in ("images", "jpeg")
            and self.image_size
            and any(n % 2 for n in self.image_size)
        ):
            raise UserError(f"image_size={self.image_size}: videos need even sizes, or pictures=images")
        if len(share_of([""] * self.demos_per_task, self.held_out)) == self.demos_per_task:
            none = f"of demos_per_task={self.demos_per_task} none are left to train on"
            raise UserError(f"held_out={self.held_out}: {none}; raise that, or give held_out=0")

    @property
    def processes(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def robot(self) -> Robot:
        return BENCHMARKS[TASKS[self.tasks[0]].robot_kind]().robot

    def settings(self) -> dict[str, Any]:
        """Those that the data depend on."""
        others = "output", "resume", "overwrite", "workers", "simpler_root"
        return {key: value for key, value in asdict(self).items() if key not in others}

    def identity(self) -> dict[str, Any]:
        """Those that each demonstration depends on; how many are written, and how, can change until then."""
        others = ["tasks", "format", "pictures", "held_out"]
        others += ["demos_per_task"] if self.starts == "random" else []  # else it says which starts
        return {key: value for key, value in self.settings().items() if key not in others}


@dataclass(frozen=True)
class Demonstration:
    """The `number`-th of a task."""

    task: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.number:05d}"

    def file(self, output: Path) -> Path:
        """With arrays `attempts` (JSON: every one) and, of what was recorded, `instruction`, `actions`,
        `state`, `pictures` (PNG, one after the other) and `ends` of these."""
        return output / FOLDER / f"{self.name}.npz"

    def start(self, config: CollectConfig, random: np.random.Generator) -> Start:
        if config.starts == "random":
            return random_start(self.task, random)
        table = episodes(self.task)
        return table[self.number * len(table) // min(len(table), config.demos_per_task)]


def plan(config: CollectConfig) -> list[Demonstration]:
    """All that are wanted; of official starts no more than there are."""
    most = {task: len(episodes(task)) if config.starts == "official" else np.inf for task in config.tasks}
    counts = {task: int(min(config.demos_per_task, most[task])) for task in config.tasks}
    return [Demonstration(task, number) for task, count in counts.items() for number in range(count)]


@dataclass
class Played:
    """What one attempt was: moment, state and action of each step; after how many steps it was solved for
    good (None: never), and whether it was disturbed."""

    moments: list[Moment]
    states: list[Float64[np.ndarray, " S"]]
    actions: list[Float64[np.ndarray, "7"]]
    solved_after: int | None
    disturbed: bool


def play(simpler: Simpler, start: Start, config: CollectConfig, random: np.random.Generator) -> Played:
    """Let the scripted policy solve an episode, and stay for `hold` steps of success.

    It has failed if there is no success within the task's own number of steps, or so many steps after the
    policy holds that it is done.
    """
    simpler.reset(start)
    policy, noise = scripted(simpler, random), smooth_noise(config, random)
    played = Played([], [], [], None, bool(random.random() < config.noise_probability))
    limit, idle = config.max_steps or start.task.steps, 0
    observed = STATES[start.task.robot_kind]
    while True:
        played.moments.append(simpler.moment())
        played.states.append(observed(simpler.observe(pictures=False), simpler.scene))
        action = np.asarray(policy.action(), float)
        played.actions.append(action)
        solved = simpler.step(action + next(noise) * UNITS if played.disturbed else action)["success"]
        played.solved_after = (played.solved_after or simpler.steps) if solved else None
        idle = idle + 1 if policy.done else 0
        if played.solved_after is None and (simpler.steps >= limit or idle >= config.hold):
            return played
        if played.solved_after is not None and simpler.steps >= played.solved_after + config.hold:
            return played


@lru_cache(1)
def world(root: str, drawn: bool) -> Simpler:
    """Of this process: its meshes and textures stay loaded."""
    return Simpler(Path(root), drawn=drawn)


def demonstrate(demo: Demonstration, config: CollectConfig, output: Path) -> list[dict[str, Any]]:
    """Every attempt at a demonstration, until one succeeds and is written; what is there is only read."""
    file = demo.file(output)
    if file.is_file():
        with reading(file, FIX):
            return json.loads(str(read_array(file, "attempts")))
    simpler, attempts, arrays = world(config.simpler_root, config.record), [], {}
    for attempt in range(config.attempts if config.starts == "random" else 1):
        random = np.random.default_rng([config.seed, *demo.task.encode(), demo.number, attempt])
        played = play(simpler, demo.start(config, random), config, random)
        told = {"task": demo.task, "solved_after": played.solved_after, "disturbed": played.disturbed}
        attempts.append(told | {"steps": len(played.actions)})
        if played.solved_after is not None:
            arrays = recorded(simpler, played, config.image_size) if config.record else {}
            break
    buffer = io.BytesIO()
    np.savez(buffer, attempts=json.dumps(attempts), **arrays)
    file.parent.mkdir(exist_ok=True)
    write_file(file, buffer.getvalue())
    return attempts


def recorded(simpler: Simpler, played: Played, image_size: Sequence[int] | None) -> dict[str, Any]:
    """What is kept of a success, its pictures drawn now; see `Demonstration.file`."""
    coded = [encode_picture(shrunk(simpler.picture(each), image_size), "PNG") for each in played.moments]
    return {
        "instruction": simpler.episode.instruction,
        "actions": np.array(played.actions, np.float32),
        "state": np.array(played.states, np.float32),
        "pictures": np.frombuffer(b"".join(coded), np.uint8),
        "ends": np.cumsum([len(each) for each in coded]),
    }


def shrunk(
    picture: UInt8[np.ndarray, "H W 3"], size: Sequence[int] | None
) -> UInt8[np.ndarray, "height width 3"]:
    """At another size, [width, height], as policies resize what they see: bilinear with antialiasing."""
    if size is None:
        return picture
    import torch

    from defi.video import resize

    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    return resize(pixels, (size[1], size[0]))[0].round().byte().permute(1, 2, 0).numpy()


@lru_cache(4)  # the writers read one after the other, several pictures at a time
def read_array(file: Path, name: str) -> np.ndarray:
    """One of a file alone: most of it is pictures."""
    with reading(file, FIX), np.load(file) as arrays:
        return arrays[name]


class Demonstrations(Dataset):
    """Finished ones as a data set, for the writers of formats."""

    def __init__(self, output: Path, demos: Sequence[Demonstration], robot: Robot) -> None:
        self.root, self.demos, self._robot = output, demos, robot
        self.scope = f"{len(demos)} demonstrations"
        self.cameras, self.fps = tuple(robot.cameras), robot.fps
        self.action_names, self.state_names = tuple(robot.actions.names), tuple(robot.state.names)
        self.lengths = np.array([len(self._array(demo, "actions")) for demo in demos], np.int64)
        self.starts = self.lengths.cumsum() - self.lengths

    def robot(self) -> Robot:
        return self._robot

    def _array(self, demo: Demonstration, name: str) -> np.ndarray:
        return read_array(demo.file(self.root), name)

    def episode(self, number: int) -> Episode:
        demo = self.demos[number]
        words = (str(self._array(demo, "instruction")),)
        return Episode(demo.name, int(self.starts[number]), int(self.lengths[number]), words, demo.task)

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        number = int(np.searchsorted(self.starts, episode.start, side="right")) - 1
        demo, where = self.demos[number], self.demos[number].file(self.root)
        packed, bounds = self._array(demo, "pictures"), np.append(0, self._array(demo, "ends"))
        coded = [packed[bounds[place] : bounds[place + 1]].tobytes() for place in positions]
        frames = stack_frames(
            [decode_picture(each, str(where), fix=FIX) for each in coded], [where] * len(coded)
        )
        return dict.fromkeys(cameras, frames)

    @cached_property
    def motions(self) -> Motions:
        """In memory: they are read once."""
        actions, state = (
            np.concatenate([self._array(demo, name) for demo in self.demos]) for name in ("actions", "state")
        )
        return Motions(np.arange(len(actions)), actions, state)

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        return np.hstack([self.motions.actions, self.motions.state])[frames.start : frames.stop]
