"""What the official evaluation says after each step: success, and what it counts on the way. Pure numpy.

A judge is made when an episode's objects have settled and asked exactly once per step: it has a memory. Which
place of an object counts, its origin or its centre of mass, differs from rule to rule, and a box turned by
its object's pose may have negative sides: both are as in the official evaluation.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from defi.benchmarks.simpler.episodes import Task
from defi.benchmarks.simpler.poses import Pose, composed, matrix

TOUCH = 1e-6  # N s: a smaller impulse is no contact
HELD_STEPS = 5
MOVED = 0.03  # m
Info = dict[str, Any]


class Contact(NamedTuple):
    """Two bodies' names, and the impulse on the first in the last sub-step [3], N s, of all points."""

    first: str
    second: str
    impulse: np.ndarray


@dataclass
class State:
    """The world after a step. objects: poses of their origins; fingers: poses of the links by name;
    drawer: how far the named drawer is open, m."""

    objects: Mapping[str, Pose] = field(default_factory=dict)
    contacts: Sequence[Contact] = ()
    fingers: Mapping[str, Pose] = field(default_factory=dict)
    drawer: float = 0.0


@dataclass
class Settled:
    """The objects when they have come to rest. centres: centres of mass in their objects' frames [3].

    boxes: of source and target, turned into the world by their poses, with signs.
    """

    source: str
    target: str
    places: Mapping[str, np.ndarray]
    centres: Mapping[str, np.ndarray]
    boxes: Mapping[str, np.ndarray] = field(default_factory=dict)
    robot: Collection[str] = ()


class Judge(Protocol):
    def __call__(self, state: State) -> Info:
        """What the official environment's `info` says; `success` in it is of this step."""


def world_box(pose: Pose, size: Sequence[float]) -> np.ndarray:
    """A box's sides [3] as the judge takes them: turned like a vector, so that they may be negative."""
    return matrix(pose[3:]) @ np.asarray(size, float)


def _centre(state: State, settled: Settled, name: str) -> np.ndarray:
    return composed(state.objects[name], (*settled.centres[name], 1, 0, 0, 0))[:3]


def _touched(state: State, name: str) -> list[tuple[str, np.ndarray]]:
    """What an object touches, and the impulse on that."""
    on_other = [(c.second, -np.asarray(c.impulse)) for c in state.contacts if c.first == name]
    return on_other + [(c.first, np.asarray(c.impulse)) for c in state.contacts if c.second == name]


def _touches_other(state: State, name: str, allowed: Collection[str]) -> bool:
    touched = _touched(state, name)
    return any(other not in allowed and np.linalg.norm(push) > TOUCH for other, push in touched)


def _push(state: State, finger: str, name: str, opening: Sequence[float]) -> tuple[float, float]:
    """Norm of an object's impulse on a finger, and its angle in degrees to where the finger opens to."""
    push = sum((each for other, each in _touched(state, name) if other == finger), np.zeros(3))
    norm = float(np.linalg.norm(push))
    if norm == 0:
        return 0.0, 90.0
    cosine = push @ matrix(state.fingers[finger][3:]) @ opening / norm
    return norm, float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _held(
    state: State, name: str, sides: Sequence[Sequence[tuple[str, Sequence[float]]]], within: float
) -> bool:
    """Each side presses, within an angle of its opening direction; one body may do the one, one the other."""
    for side in sides:
        pushes = [_push(state, finger, name, opening) for finger, opening in side]
        if max(norm for norm, _ in pushes) < TOUCH or min(angle for _, angle in pushes) > within:
            return False
    return True


def _moved(distances: Mapping[str, float], source: str) -> tuple[bool, bool]:
    """Whether the source moved, and furthest; whether another moved, and one further than the source."""
    others = [distance for name, distance in distances.items() if name != source]
    correct = distances[source] > MOVED and all(distance < distances[source] for distance in others)
    wrong = any(distance > MOVED for distance in others)
    return correct, wrong and any(distance > distances[source] for distance in others)


WIDOWX_SIDES = [[("left_finger_link", (0, 1, 0))], [("right_finger_link", (0, -1, 0))]]
GOOGLE_SIDES = [
    [(f"link_finger_{side}", (0, 1, 0)), (f"link_finger_tip_{side}", (0, 1, 0))] for side in ("left", "right")
]


@dataclass
class PutOn:
    """Source on target, at rest or not, held or not. above, alone: of the task."""

    settled: Settled
    above: float
    alone: bool
    held_for: int = 0
    ever: dict[str, bool] = field(
        default_factory=lambda: {"is_src_obj_grasped": False, "consecutive_grasp": False}
    )

    def __call__(self, state: State) -> Info:
        settled, source = self.settled, self.settled.source
        place = _centre(state, settled, source)
        distances = {
            name: float(np.linalg.norm((place if name == source else state.objects[name])[:2] - start[:2]))
            for name, start in settled.places.items()
        }
        correct, wrong = _moved(distances, source)
        held = _held(state, source, WIDOWX_SIDES, 60)
        self.held_for = self.held_for + 1 if held else 0
        grasps = {"is_src_obj_grasped": held, "consecutive_grasp": self.held_for >= HELD_STEPS}
        self.ever = {name: self.ever[name] or now for name, now in grasps.items()}

        offset = place - _centre(state, settled, settled.target)
        half, base = settled.boxes[source] / 2, settled.boxes[settled.target] / 2
        on = np.linalg.norm(offset[:2]) <= np.linalg.norm(base[:2]) + 0.003
        on = on and offset[2] > 0 and offset[2] - base[2] - half[2] <= self.above
        if self.alone and _touches_other(state, source, {settled.target, *settled.robot}):
            on = False
        now = {"moved_correct_obj": correct, "moved_wrong_obj": wrong, "src_on_target": bool(on)}
        return {**now, **grasps, "episode_stats": {**now, **self.ever}, "success": bool(on)}


@dataclass
class PickUp:
    """The source held and clear of the table, or clearly above it for long."""

    settled: Settled
    held_for: int = 0
    lifted: bool = False
    stats: Info = field(
        default_factory=lambda: {"n_lift_significant": 0, "consec_grasp": False, "grasped": False}
    )

    def __call__(self, state: State) -> Info:
        source = self.settled.source
        held = _held(state, source, GOOGLE_SIDES, 80)
        self.held_for = self.held_for + 1 if held else 0
        rise = state.objects[source][2] - self.settled.places[source][2]
        free = not _touches_other(state, source, self.settled.robot)
        self.lifted = bool((held and self.lifted) or (free and rise > 0.01))
        significantly = bool(self.lifted and rise > 0.02)
        long = self.held_for >= HELD_STEPS
        self.stats = {
            "n_lift_significant": self.stats["n_lift_significant"] + significantly,
            "consec_grasp": self.stats["consec_grasp"] or long,
            "grasped": self.stats["grasped"] or held,
        }
        return {
            "is_grasped": held,
            "consecutive_grasp": long,
            "lifted_object": self.lifted,
            "lifted_object_significantly": significantly,
            "success": self.lifted or self.stats["n_lift_significant"] >= 5,
            "episode_stats": self.stats,
        }


@dataclass
class MoveNear:
    """Source moved to the target, nearer to it than to all else, and nothing fell."""

    settled: Settled

    def __call__(self, state: State) -> Info:
        settled, source, target = self.settled, self.settled.source, self.settled.target
        moves = {name: state.objects[name][:3] - start for name, start in settled.places.items()}
        correct, wrong = _moved(
            {name: float(np.linalg.norm(move[:2])) for name, move in moves.items()}, source
        )
        places = {name: _centre(state, settled, name) for name in (source, target)}
        up = all(
            places[name][2] - start[2] > -0.15 if name in places else moves[name][2] > -0.02
            for name, start in settled.places.items()
        )
        apart = np.linalg.norm((places[source] - places[target])[:2])
        near = apart < sum(np.linalg.norm(settled.boxes[name][:2]) / 2 for name in (source, target)) + 0.10
        closest = all(
            apart < np.linalg.norm((places[source] - state.objects[name][:3])[:2]) + 0.01
            for name in settled.places
            if name != source
        )
        now = {
            "all_obj_keep_height": bool(up),
            "moved_correct_obj": correct,
            "moved_wrong_obj": wrong,
            "near_tgt_obj": bool(near),
            "is_closest_to_tgt": bool(closest),
        }
        return {**now, "episode_stats": now, "success": bool(up and correct and near and closest)}


@dataclass
class Drawer:
    """kind: open or close."""

    kind: str

    def __call__(self, state: State) -> Info:
        done = state.drawer >= 0.15 if self.kind == "open" else state.drawer <= 0.05
        return {"success": bool(done), "qpos": state.drawer, "episode_stats": {"qpos": f"{state.drawer:.3f}"}}


def judge_of(task: Task, settled: Settled | None) -> Judge:
    """A new judge for one episode; the drawers' needs nothing settled."""
    if settled is None or task.kind in ("open", "close"):
        return Drawer(task.kind)
    if task.kind == "put":
        return PutOn(settled, task.above, task.alone)
    return PickUp(settled) if task.kind == "pick" else MoveNear(settled)
