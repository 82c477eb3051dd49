"""Settings of `python -m defi.sim.collect`; configs/collect.yaml says what each one is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from defi.calvin import TRAINING, VALIDATION
from defi.errors import UserError
from defi.sim.scenes import SCENES
from defi.sim.tasks import INSTRUCTIONS, TASKS, check_tasks

UNSEEN = "D"
AT_LEAST_1 = ("workers", "demos_per_task", "demos_per_session", "static_size", "gripper_size", "play.hold")
AT_LEAST_0 = ("variations", "validation.demos_per_task")


@dataclass
class PlayConfig:
    """How tasks are played one after the other."""

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


@dataclass
class SplitConfig:
    """What a split is collected from; for training it stands at the top level of `CollectConfig`."""

    scenes: Any
    demos_per_task: int
    variations: int = 0


@dataclass
class CollectConfig:
    """Raises UserError on values that make no sense. A single name becomes a list of one."""

    seed: int
    output: str
    resume: bool
    overwrite: bool
    record: bool
    workers: int
    tasks: Any
    scenes: Any
    variations: int
    demos_per_task: int
    validation: SplitConfig
    demos_per_session: int
    static_size: int
    gripper_size: int
    play: PlayConfig

    def __post_init__(self) -> None:
        self.tasks = list(TASKS if self.tasks == "all" else check_tasks(_names("tasks", self.tasks)))
        self.scenes = _names("scenes", self.scenes, SCENES)
        self.validation.scenes = _names("validation.scenes", self.validation.scenes, SCENES)
        if self.variations and UNSEEN in self.scenes:
            raise UserError(f"scenes: {UNSEEN} has no variations to train on; set variations=0")
        for least, keys in ((1, AT_LEAST_1), (0, AT_LEAST_0)):
            for key in keys:
                if (value := attrgetter(key)(self)) < least:
                    raise UserError(f"{key}={value}: must be {least} or more")

    @property
    def splits(self) -> dict[str, SplitConfig]:
        """Those that are collected."""
        training = SplitConfig(self.scenes, self.demos_per_task, self.variations)
        splits = {TRAINING: training, VALIDATION: self.validation}
        return {name: split for name, split in splits.items() if split.demos_per_task}

    def phrasings(self, split: str) -> dict[str, tuple[str, ...]]:
        """Instructions to choose from, per task; in validation always the first."""
        return {task: INSTRUCTIONS[task][: 1 if split == VALIDATION else None] for task in self.tasks}

    def identity(self) -> dict[str, Any]:
        """The settings that the data depend on."""
        return {
            k: v for k, v in asdict(self).items() if k not in ("output", "resume", "overwrite", "workers")
        }


def _names(key: str, value: Any, known: Sequence[str] = ()) -> list[str]:
    names = [value] if isinstance(value, str) else list(value)
    if not names:
        raise UserError(f"{key}=[]: name at least one")
    if known and (unknown := [name for name in names if name not in known]):
        raise UserError(f"{key}: there is no scene {unknown[0]}; choose from {', '.join(known)}")
    return names
