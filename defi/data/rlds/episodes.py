"""RLDS as data of every stage: cameras, instructions, actions and state of a split's episodes."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from omegaconf import OmegaConf

from defi.config import typed
from defi.data.episode import Dataset, DataSettings, Episode, Frames, Part, completed
from defi.data.rlds.dataset import RLDSDataset, default_splits
from defi.data.rlds.spec import FEATURES, METADATA, STEPS, choose_split, find_version, read_splits
from defi.data.rlds.standardise import GRIPPERS, POSE, movements
from defi.errors import UserError, choose
from defi.processes import print_once
from defi.robot.spec import Robot

# Where data sets keep what a robot does: one of `ACTION`, or what there is of `ACTIONS` (Open X-Embodiment's
# names), else all that lies below `action`; and the robot's state, the first of `STATES`.
ACTION, ACTIONS = "action", ("world_vector", "rotation_delta", "gripper_closedness_action")
ON_HAND = ("wrist", "hand", "gripper")  # in the names of cameras that move with the robot, and come last
STATES = ["observation/state", "observation/proprio", "observation/base_pose_tool_reached"]
LONGEST_TRIM = 10**6  # steps


@dataclass(kw_only=True)
class Settings(DataSettings):
    """See configs/data/rlds.yaml. trim: steps left out at the start and the end of every episode.

    gripper, movement, robot: what Open X-Embodiment's sets do not say or say each in its own way
    (`defi.data.rlds.standardise`, `defi.robot.spec`).
    """

    fps: float | None = None
    language: str | None = None
    actions: list[str] | None = None
    state: list[str] | None = None
    gripper: str | None = None
    movement: str | None = None
    robot: dict[str, Any] | None = None
    pair_distance: list[int] | None = None
    trim: list[int] = field(default_factory=lambda: [0, 0])
    drop_unlabelled: bool = False
    index: str | None = None

    def __post_init__(self) -> None:
        if len(self.trim) != 2 or not all(0 <= steps <= LONGEST_TRIM for steps in self.trim):
            raise UserError(f"data.trim={self.trim}: must be [steps at the start, steps at the end]")
        if self.fps is not None and not 0 < self.fps < 1000:
            raise UserError(f"data.fps={self.fps}: must be a rate above 0 and below 1000")
        apart = [1, 1] if self.pair_distance is None else self.pair_distance
        if len(apart) != 2 or not 1 <= apart[0] <= apart[1] <= LONGEST_TRIM:
            raise UserError(f"data.pair_distance={self.pair_distance}: must be [low, high], [9,9] say")
        choose("data.gripper", self.gripper, (None, *GRIPPERS))
        choose("data.movement", self.movement, (None, "reached"))
        if self.movement and not self.trim[1]:
            fix = "leave it out, as data.trim=[0,1] does"
            raise UserError(f"data.movement={self.movement}: an episode's last step reaches nothing; {fix}")

    def open(self, part: Part) -> "RLDSData":
        split, other = (self.held_out, self.split) if part == "held_out" else (self.split, self.held_out)
        named = bool(split)
        if not named:
            training, held_out = default_splits(self.root)
            if part == "held_out" and held_out == "train" and not other:
                what = "too few episodes to hold any out; they are the training's (data.held_out)"
                warnings.warn(f"{self.root}: {what}", stacklevel=2)
            split = held_out if part == "held_out" else training
            split = split.partition("[")[0] if part == "all" else split
        apart = other and (part == "held_out" or part == "training" and not named)
        return RLDSData(self, self._apart(split, other, named) if apart else split)

    def _apart(self, split: str, other: str, named: bool) -> str:
        """A split, or, if nobody named it and it shares episodes with another, the most which that leaves."""
        folder = find_version(Path(self.root))
        (mine, own), (of, others) = (choose_split(folder, read_splits(folder), s) for s in (split, other))
        shared = range(max(own.start, others.start), min(own.stop, others.stop))
        if mine.name != of.name or not shared:
            return split
        rest = max(range(others.start), range(others.stop, mine.episodes), key=len)
        if rest and not named:
            return f"{mine.name}[{rest.start}:{rest.stop}]"
        both = f"{len(shared):,} episodes of {mine.name} are both in data.split and in data.held_out"
        print_once(f"{folder}: {both} ({split}, {other})")
        return split

    def data(self, split: str) -> RLDSDataset:
        return RLDSDataset(self.root, split, index=self.index)


class RLDSData(Dataset):
    """An episode per episode of a split, named by its number there; its frames are the split's steps.

    dropped: episodes that are left out, without a text.

    Raises:
        UserError: no episode has an instruction, and those without are left out; a setting names no feature.
    """

    known_by_names = False

    def __init__(self, settings: Settings, split: str) -> None:
        self.settings, self.data = settings, (data := settings.data(split))
        self.root, self.fingerprint = data.folder, data.fingerprint
        self.fps = settings.fps or data.metadata.fps
        self.stamp = data.stamp
        self.pair_distance = settings.pair_distance or [9, 9]  # of most sets of the published mixtures
        chosen = [settings.actions, settings.state]
        if settings.gripper or settings.movement:
            chosen += [settings.gripper, settings.movement]
        if any(chosen):  # else features.json decides, which the fingerprint is of
            chosen = json.dumps(chosen)
            self.fingerprint += f"-{hashlib.sha256(chosen.encode()).hexdigest()[:8]}"
        short = {path.removeprefix("observation/").replace("/", "_"): path for path in data.pictures}
        order = sorted(short, key=lambda name: (any(word in name for word in ON_HAND), name))
        known = data.metadata.cameras
        order.sort(key=lambda name: known.index(name) if name in known else len(known))
        everything = {name: short[name] for name in order}
        named = {name: data.picture(place) for name, place in settings.places().items()}
        self._pictures = named or everything
        self.cameras = tuple(self._pictures)
        self.language, self.trim = data.language(settings.language), settings.trim
        self._actions = self._paths("actions", settings.actions, self._usual_actions())
        state, usual = settings.state, [s for s in STATES if self._is_vector(s)][:1]
        if state and not any(STEPS + path in data.spec for path in state):  # few policies read it
            print_once(f"{data.folder}: has no {', '.join(state)} (data.state): a robot without state")
            state = []
        self._state = self._paths("state", state, usual)
        self.action_names, self.state_names = self._names(self._actions), self._names(self._state)
        self._robot = self._described(settings.robot or {})
        for vector, name in ((self._robot.actions, "action_names"), (self._robot.state, "state_names")):
            setattr(self, name, tuple(vector.names) if vector else ())
        if settings.movement and min(len(self.action_names), len(self.state_names)) < POSE:
            have = f"actions have {len(self.action_names)} numbers, the state {len(self.state_names)}"
            raise UserError(f"data.movement={settings.movement}: takes {POSE} or more of both; here {have}")
        kept = (
            data.labelled(self.language, self.trim) if settings.drop_unlabelled else np.ones(len(data), bool)
        )
        self.numbers, self.dropped = kept.nonzero()[0], int((~kept).sum())  # numbers: in what was opened
        self.starts = data.firsts[self.numbers] + self.trim[0]
        self.lengths = (data.lengths[self.numbers] - sum(self.trim)).clip(0)
        what = f"{data.folder}: of {len(data):,} episodes of {data.split.name}"
        if self.dropped == len(data):
            raise UserError(f"{what} none has an instruction; data.drop_unlabelled=false keeps them")
        if self.dropped:
            why = "they have no instruction (data.drop_unlabelled)"
            warnings.warn(f"{what} {self.dropped:,} are left out: {why}", stacklevel=2)
        self.scope, others = f"{data.folder} ({split})", data.split.episodes - len(data)
        unseen = [name for name, path in everything.items() if path not in self._pictures.values()]
        self.left_out = [f"the camera {name} (data.cameras)" for name in unseen]
        unused = read_splits(data.folder).keys() - {data.split.name}
        self.left_out += [f"the split {other} (data.split)" for other in sorted(unused)]
        for number, text in (
            (others, f"{others:,} episodes of {data.split.name} (data.split)"),
            (self.dropped, f"{self.dropped:,} episodes without an instruction (data.drop_unlabelled)"),
            (sum(self.trim), f"{self.trim[0]} and {self.trim[1]} steps at their ends (data.trim)"),
        ):
            self.left_out += [text] if number else []

    # ------------------------------------------------------------ episodes

    def episode(self, number: int) -> Episode:
        which, first, length = int(self.numbers[number]), self.trim[0], int(self.lengths[number])
        texts = self.data.texts(which, self.language, slice(first, first + length))
        return Episode(f"{self.data.first + which:06d}", int(self.starts[number]), length, texts or ("",))

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        which = int(episode.name) - self.data.first
        steps = [self.trim[0] + position for position in positions]
        return {camera: self.data.frames(which, steps, self._pictures[camera]) for camera in cameras}

    def size(self) -> int:
        """Steps of all splits but the trimmed ones, as the published code counts a data set."""
        steps = 0
        for split in read_splits(find_version(Path(self.settings.root))):
            try:
                steps += int((self.settings.data(split).lengths - sum(self.trim)).clip(0).sum())
            except UserError as error:  # not of the split that is open
                warnings.warn(f"share without the split {split}: {error}", stacklevel=2)
        return steps

    # ------------------------------------------------------------ actions and state

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        which = self.numbers[np.searchsorted(self.starts, frames.start, side="right") - 1]
        first = frames.start - int(self.data.firsts[which])
        found, width = self.data.vectors(int(which), [*self._actions, *self._state]), len(self.action_names)
        if np.isfinite(found).all():  # else the index says what is not
            if self.settings.gripper:
                found[:, width - 1] = GRIPPERS[self.settings.gripper](found[:, width - 1])
            if self.settings.movement:
                found[:, :POSE] = movements(found[:, width:])
        return found[first : first + len(frames)]

    def robot(self) -> Robot:
        return self._robot

    def _described(self, given: Mapping[str, Any]) -> Robot:
        """As the data say, and before them the setting `robot`."""
        robot, said = super().robot(), self.data.metadata.robot
        if said is not None:
            written = {"actions": self._actions == [ACTION], "state": self._state == STATES[:1]}
            parts = [part for part, own in written.items() if own]
            robot = completed(robot, said, self.root / METADATA, parts)
        if robot.state is None:
            given = {key: value for key, value in given.items() if key != "state"}
        found = typed(Robot, OmegaConf.merge(asdict(robot), given), "data.robot")
        for name in ("actions", "state"):
            its, own = (len(getattr(each, name) or ()) for each in (found, robot))
            if its != own:
                has = f"the data have {own} (data.{name})"
                raise UserError(f"data.robot.{name}: names {its} numbers, {has}")
        if found.cameras != robot.cameras:
            raise UserError("data.robot.cameras: name them with data.cameras=[name:place in the data]")
        return found

    def _is_vector(self, path: str) -> bool:
        feature = self.data.spec.get(STEPS + path)
        return feature is not None and feature.kind == "tensor" and None not in feature.shape

    def _usual_actions(self) -> list[str]:
        if self._is_vector(ACTION):
            return [ACTION]
        paths = (path.removeprefix(STEPS) for path in self.data.spec)
        below = [path for path in paths if path.startswith(f"{ACTION}/") and self._is_vector(path)]
        usual = [path for path in (f"{ACTION}/{name}" for name in ACTIONS) if path in below]
        return usual or sorted(path for path in below if "terminate" not in path)

    def _paths(self, key: str, given: Sequence[str] | None, usual: list[str]) -> list[str]:
        if wrong := [path for path in given or () if not self._is_vector(path)]:
            paths = (path.removeprefix(STEPS) for path in self.data.spec if path.startswith(STEPS))
            known = ", ".join(path for path in paths if self._is_vector(path))
            where = self.data.folder / FEATURES
            raise UserError(f"{where}: data.{key}={wrong[0]}: is no vector of fixed size; there are {known}")
        return usual if given is None else list(given)

    def _names(self, paths: Sequence[str]) -> tuple[str, ...]:
        """`world_vector_0`, `world_vector_1`, …; of a single number `gripper_closedness_action`."""
        last = Counter(path.rpartition("/")[2] for path in paths)
        names: list[str] = []
        for path in paths:
            short, shape = path.rpartition("/")[2], self.data.spec[STEPS + path].shape
            name, size = short if last[short] == 1 else path.replace("/", "_"), int(np.prod(shape))
            plain = [name] if size == 1 else [f"{name}_{number}" for number in range(size)]
            own = self.data.metadata.names.get(path, [])
            names += own if len(own) == size else plain
        return tuple(names)
