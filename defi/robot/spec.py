"""What a robot sees and does: made from its data, kept in policy checkpoints, checked where both meet."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from defi.errors import UserError

if TYPE_CHECKING:
    from defi.data.motions import Motions, Statistics

NORMALISATIONS = ("none", "mean_std", "bounds")
RARE = 1e-3  # of the whole range: if 98 % of the frames have less, all of it counts
NOISE = 1e-6  # of its mean: a dimension that changes less is constant in float32
ROUNDING = 1e-6  # of a limit, or of 1: so much beyond it is no matter
Numbers = TypeVar("Numbers", np.ndarray, Any)  # an array or a tensor [..., A]


@dataclass
class Vector:
    """Actions or state, per dimension. Lists other than `names` are as long as it.

    units: "" where unknown. relative: a change, not a place or pose.
    normalisation: none; mean_std; or bounds: the quantiles 0.01 … 0.99 to −1 … 1.
    offset, scale: what the networks see is (value − offset) / scale.
    low, high: smallest and largest value in the training data; empty where nobody looked.
    """

    names: list[str]
    units: list[str]
    relative: list[bool]
    normalisation: list[str]
    offset: list[float]
    scale: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    @classmethod
    def plain(
        cls,
        names: Sequence[str],
        *,
        low: Sequence[float] = (),
        high: Sequence[float] = (),
        units: Sequence[str] = (),
    ) -> "Vector":
        """Of these numbers nothing else is known, and nothing is done to them."""
        size = len(names)
        lists = list(units) or [""] * size, [False] * size, ["none"] * size, [0.0] * size, [1.0] * size
        return cls(list(names), *lists, low=list(low), high=list(high))

    def __post_init__(self) -> None:
        lists = (self.units, self.relative, self.normalisation, self.offset, self.scale)
        if {len(each) for each in lists} != {len(self)}:
            raise UserError(f"robot: {len(self)} names, but lists of {[len(each) for each in lists]} values")
        if (ends := (len(self.low), len(self.high))) not in ((0, 0), (len(self), len(self))):
            raise UserError(f"robot: {len(self)} names, but {ends[0]} values of low and {ends[1]} of high")
        if unknown := set(self.normalisation) - set(NORMALISATIONS):
            raise UserError(f"robot: normalisation={min(unknown)}: choose from {', '.join(NORMALISATIONS)}")
        if not all(map(math.isfinite, self.offset)) or not all(0 < scale < math.inf for scale in self.scale):
            raise UserError("robot: offset and scale must be finite numbers, scale more than 0")

    def __len__(self) -> int:
        return len(self.names)

    def fitted(self, found: "Statistics", normalisation: Sequence[str]) -> "Vector":
        """Normalised so, by what was found in the training data; a dimension that is constant there keeps
        its scale."""
        offset, scale = np.zeros(len(self)), np.ones(len(self))
        for i, kind in enumerate(normalisation):
            if kind == "mean_std":
                offset[i], scale[i] = found.mean[i], found.std[i]
            elif kind == "bounds":
                low, high = found.low[i], found.high[i]
                if high - low <= RARE * (found.maximum[i] - found.minimum[i]):  # moves in few frames
                    low, high = found.minimum[i], found.maximum[i]
                offset[i], scale[i] = (low + high) / 2, (high - low) / 2
        scale[scale <= NOISE * np.abs(offset)] = 1
        return replace(
            self,
            normalisation=list(normalisation),
            offset=offset.tolist(),
            scale=scale.tolist(),
            low=found.minimum.tolist(),
            high=found.maximum.tolist(),
        )

    def normalise(self, values: Numbers) -> Numbers:
        """Robot's units → what the networks see."""
        if set(self.normalisation) == {"none"}:  # to the last bit
            return values
        return (values - _like(self.offset, values)) / _like(self.scale, values)

    def restore(self, values: Numbers) -> Numbers:
        """What the networks see → robot's units."""
        if set(self.normalisation) == {"none"}:
            return values
        return values * _like(self.scale, values) + _like(self.offset, values)

    def differences(self, other: "Vector") -> Iterator[str]:
        """In what this one's numbers mean something else; units only where both know them."""
        if self.names != other.names:
            yield f"{len(self)} {self.names}, not {len(other)} {other.names}"
            return
        mine, others = ((each.units, each.relative) for each in (self, other))
        for name, unit, relative, its_unit, its_relative in zip(self.names, *mine, *others):
            if unit and its_unit and (unit, relative) != (its_unit, its_relative):
                kinds = {True: "relative", False: "absolute"}
                yield f"{name} {kinds[relative]} in {unit}, not {kinds[its_relative]} in {its_unit}"


def _like(numbers: list[float], values: Any) -> Any:
    is_array = isinstance(values, np.ndarray)
    return np.asarray(numbers, values.dtype) if is_array else values.new_tensor(numbers)


@dataclass
class Gripper:
    """The dimension of an action that moves the gripper.

    threshold: when acting, values above it become `above`, others `below`. opens: whether `above` opens it.
    held: values between −threshold and threshold are no command: the chunk's last one stays, before it 0.
    """

    dimension: int
    threshold: float = 0.0
    above: float = 1.0
    below: float = -1.0
    opens: bool = True
    held: bool = False

    def snap(self, actions: np.ndarray) -> np.ndarray:
        """Actions [..., K, A] in the robot's units, the gripper's at one of its two values."""
        actions = actions.copy()
        command = actions[..., self.dimension]
        snapped = np.where(command > self.threshold, self.above, self.below)
        if self.held:
            given = np.where(np.abs(command) > self.threshold, np.arange(command.shape[-1]), -1)
            last = np.maximum.accumulate(given, axis=-1)
            snapped = np.where(last < 0, 0, np.take_along_axis(snapped, last.clip(0), axis=-1))
        actions[..., self.dimension] = snapped
        return actions


@dataclass
class Robot:
    """What a robot sees and does.

    cameras: names of the views V, in order; the first is the one that the latent action looks at.
    fps: control steps, and frames, per second; None: unknown.
    executed: actions of a chunk that are carried out before the next look; None: all.
    """

    cameras: list[str]
    actions: Vector
    state: Vector | None = None
    fps: float | None = None
    gripper: Gripper | None = None
    executed: int | None = None

    def __post_init__(self) -> None:
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise UserError(f"robot.cameras={self.cameras}: name one or more, none of them twice")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(f"robot.fps={self.fps}: must be a number of steps per second, more than 0")
        if self.executed is not None and self.executed < 1:
            raise UserError(f"robot.executed={self.executed}: must be 1 or more")
        if self.gripper is not None and not 0 <= self.gripper.dimension < len(self.actions):
            last = len(self.actions) - 1
            raise UserError(f"robot.gripper.dimension={self.gripper.dimension}: must lie in 0 … {last}")

    def fitted(self, motions: "Motions", normalisation: str) -> "Robot":
        """All of the state, and of the actions all but the gripper, normalised by the training data."""
        from defi.data.motions import Statistics  # which imports this module

        kinds = [normalisation] * len(self.actions)
        if self.gripper is not None:
            kinds[self.gripper.dimension] = "none"
        actions, state = self.actions.fitted(Statistics.of(motions.actions), kinds), self.state
        if state is not None:
            state = state.fitted(Statistics.of(motions.state), [normalisation] * len(state))
        return replace(self, actions=actions, state=state)

    def check(self, observation: Any, *, state: bool) -> None:
        """Whether it is what this robot sees; of the state only where it is read.

        Raises:
            UserError: a camera is missing, or something in it has another type or size.
        """
        seen = observation if isinstance(observation, Mapping) else {}
        images = seen.get("images")
        for camera in self.cameras:
            if not isinstance(images, Mapping) or camera not in images:
                has = f"the robot sees {', '.join(self.cameras)}"
                raise UserError(f"observation: no picture of the camera {camera}; {has}")
            dtype, shape = getattr(images[camera], "dtype", None), np.shape(images[camera])
            if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
                wrong = f"is {dtype or type(images[camera]).__name__} {list(shape)}"
                raise UserError(f"observation: the picture of {camera} {wrong}; give uint8 [H, W, 3]")
        if not isinstance(seen.get("instruction"), str):
            raise UserError("observation: no instruction; give a sentence")
        if state and self.state:
            wanted, names = len(self.state), ", ".join(self.state.names)
            if "state" not in seen:
                raise UserError(f"observation: no state; give {wanted} numbers: {names}")
            found = np.asarray(seen["state"])
            finite = found.dtype.kind in "fiu"
            with np.errstate(over="ignore"):  # as a policy reads it
                finite = finite and bool(np.isfinite(found.astype(np.float32)).all())
            if found.shape != (wanted,) or not finite:
                wrong = f"state is {found.dtype} {list(found.shape)}"
                raise UserError(f"observation: {wrong}; give {wanted} finite numbers: {names}")

    def rows(self, *, state: bool) -> Iterator[tuple[str, str, str, str, str]]:
        """Cameras, actions and, if it is read, state, for people: what, name, unit, normalisation, range."""
        for camera in self.cameras:
            yield "camera", camera, "", "", ""
        for what, vector in (("action", self.actions), ("state", self.state if state else None)):
            for i, name in enumerate(vector.names if vector else ()):
                change = "change in " if vector.relative[i] else ""
                normal, ends = vector.normalisation[i], ""
                if normal != "none":
                    normal += f": (x − {vector.offset[i]:.4g}) / {vector.scale[i]:.4g}"
                if vector.low:
                    ends = f"{vector.low[i]:.4g} … {vector.high[i]:.4g}"
                yield what, name, change + (vector.units[i] or "unknown unit"), normal, ends

    def limit(self, actions: np.ndarray, margin: float, held: int = 0) -> tuple[np.ndarray, list[str]]:
        """Actions [K, A] in the robot's units, clipped to what the training data held, low … high, widened by
        `margin` times that range at both ends; and what of them lay beyond, by more than rounding, in words.

        The gripper's two values are left alone, the first `held` actions, which are under way, and everything
        where nobody looked for low and high.

        Raises:
            UserError: NaN or infinite actions.
        """
        if not np.isfinite(actions).all():
            fix = "its weights or its precision are broken, or it was shown numbers that are far out"
            raise UserError(f"the policy returned NaN or infinite actions; {fix}")
        if not self.actions.low:
            return actions, []
        low, high = np.asarray(self.actions.low), np.asarray(self.actions.high)
        room = margin * (high - low)
        low, high = (low - room).astype(np.float32), (high + room).astype(np.float32)
        if self.gripper is not None:
            low[self.gripper.dimension], high[self.gripper.dimension] = -np.inf, np.inf
        rounding = ROUNDING * np.maximum(1, np.maximum(np.abs(low), np.abs(high)))
        clipped = actions.copy()
        clipped[held:] = np.clip(actions[held:], low, high)
        beyond = [
            f"{self.actions.names[i]} {actions[k, i]:.4g} in step {k} (at {low[i]:.4g} … {high[i]:.4g})"
            for k, i in np.argwhere((actions < low - rounding) | (actions > high + rounding))
            if k >= held
        ]
        return clipped, beyond

    def summary(self, chunk: int) -> str:
        """Rate, chunk and gripper in a line, for people."""
        rate = f"{self.fps:g} steps per second" if self.fps else "unknown rate"
        parts = [rate, f"{self.executed or chunk} of {chunk} actions are carried out before the next look"]
        if found := self.gripper:
            name, effect = self.actions.names[found.dimension], "opens" if found.opens else "closes"
            above = f"{found.above:g} ({effect}) above {found.threshold:g}"
            parts.append(f"{name} {above}, else {found.below:g}")
        return "; ".join(parts)

    def grip(self) -> str | None:
        """What the gripper's number means, in words; None: nobody says."""
        if (found := self.gripper) is None:
            return None
        kind = "change by action" if self.actions.relative[found.dimension] else "action"
        effects = ("opens", "closes") if found.opens else ("closes", "opens")
        meaning = f"{found.above:g} {effects[0]}, {found.below:g} {effects[1]}"
        return f"{kind} {found.dimension}: {meaning}"

    def differences(self, other: "Robot") -> list[str]:
        """What this robot sees or does otherwise than another, in words; none where they can be exchanged.

        Normalisation does not count, and nothing that one of them leaves open.
        """
        found = []
        if self.cameras != other.cameras:
            found.append(f"cameras {self.cameras}, not {other.cameras}")
        found += [f"actions: {each}" for each in self.actions.differences(other.actions)]
        if self.state and other.state:
            found += [f"state: {each}" for each in self.state.differences(other.state)]
        if self.fps and other.fps and self.fps != other.fps:
            found.append(f"{self.fps:g} steps per second, not {other.fps:g}")
        mine, its = self.grip(), other.grip()
        if mine and its and mine != its:
            found.append(f"gripper ({mine}), not ({its})")
        return found
