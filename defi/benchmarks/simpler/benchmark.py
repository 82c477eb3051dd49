"""SIMPLER as a benchmark: settings, robots, scores, published figures.

configs/benchmark/simpler_widowx.yaml and simpler_google.yaml say what each setting is for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from defi.benchmarks.benchmark import (
    About,
    Benchmark,
    Environment,
    Episode,
    Observation,
    Outcome,
    Published,
    Simulation,
    Step,
    name_of,
)
from defi.benchmarks.simpler import check
from defi.benchmarks.simpler.environment import Observation as Seen
from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.episodes import CAN_LIES, TASKS, episodes
from defi.benchmarks.simpler.episodes import Episode as Start
from defi.benchmarks.simpler.poses import matrix
from defi.benchmarks.simpler.scene import Scene
from defi.benchmarks.simpler.variants import variants as variants_of
from defi.benchmarks.statistics import Summary, nested_weights, weighted_rate
from defi.errors import UserError, choose
from defi.robot.spec import Gripper, Robot, Vector

# "ever" and stopping at the first success count the same episodes: what comes later is not looked at.
EVER, LAST = "any step", "last step"
NOT_STATED, VISUAL_MATCHING = "not stated", "visual matching"
COLUMNS = {
    "widowx_spoon_on_towel": "spoon",
    "widowx_carrot_on_plate": "carrot",
    "widowx_stack_cube": "cube",
    "widowx_put_eggplant_in_basket": "eggplant",
    "google_robot_pick_coke_can": "coke can",
    "google_robot_move_near_v0": "move near",
    "google_robot_move_near_v1": "move near v1",
}
DRAWERS = "drawers"  # all other tasks
LONG = {DRAWERS: "drawers, mean of open and close"}
RASTER = (
    "The drawers' pictures are rasterised; officially they are ray-traced. Their figure, and an average that "
    "holds them, does not compare with published ones."
)
NOTE = (
    "Averages are means of the tasks' means, of drawers the mean of open and close, within a task the mean "
    "of its settings. Success at the last step is the official figure; at any step is what others call ever, "
    "and what stopping at the first success counts. Intervals are 95 %, Wilson's, with the effective number "
    "of starts. Repeats of a start differ by the policy's own noise only, and do not narrow the intervals."
)
AUTHORS = "SIMPLER (Li et al., 2024), visual matching, last step"


@dataclass(frozen=True)
class Trial(Episode):
    """One start, tried for the `repeat`-th time, from 0."""

    start: Start
    repeat: int

    @property
    def world(self) -> str:  # type: ignore[override]
        """Meshes and textures stay loaded."""
        return f"{self.start.task.name} {self.start.colours} {self.start.look.stage}"


class SimplerEnvironment(Environment):
    """The world of `environment.py`. camera: what its picture is called. limit: control steps, if fewer than
    the task's own. traced: the drawers' pictures."""

    def __init__(self, root: Path, camera: str, limit: int | None = None, traced: bool = False) -> None:
        self.simpler, self.camera, self.limit = Simpler(root, traced=traced), camera, limit

    def reset(self, episode: Trial) -> None:
        self.trial, self.task = episode, episode.start.task.name
        self.first: int | None = None
        self.simpler.reset(episode.start)

    def observe(self) -> Observation:
        seen = self.simpler.observe()
        (picture,) = seen.images.values()
        state = STATES[self.trial.start.task.robot_kind](seen, self.simpler.scene)
        return {"images": {self.camera: picture}, "instruction": seen.instruction, "state": state}

    def step(self, action: Float[np.ndarray, "7"]) -> Step:
        simpler, own = self.simpler, self.trial.start.task.steps
        solved = bool(simpler.step(action)["success"])
        if solved and self.first is None:
            self.first = simpler.steps
        return Step(over=simpler.steps >= min(own, self.limit or own), solved=solved)

    def outcome(self) -> Outcome:
        """`first_success`: the control step, from 1; None: never. `stats`: as the official judge counts."""
        start = self.trial.start
        return {
            "task": self.task,
            "setting": start.setting,
            "start": start.index,
            "repeat": self.trial.repeat,
            "success": bool(self.simpler.info["success"]),
            "first_success": self.first,
            "stats": self.simpler.info["episode_stats"],
        }


def _closed(seen: Seen, scene: Scene, wide: int) -> float:
    """How far the fingers are closed, 0 … 1. wide: the end of a finger's range where it is open."""
    fingers = [i for i, drive in enumerate(scene.robot.drives) if "finger" in drive.joint]
    ranges = np.array([scene.limits[i] for i in fingers])
    return float(np.mean((seen.joints[fingers] - ranges[:, wide]) / (ranges[:, 1 - wide] - ranges[:, wide])))


POINTS_DOWN = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # from where Bridge's data count the turn


def widowx_state(seen: Seen, scene: Scene) -> Float[np.ndarray, "7"]:
    """As in Bridge's data: place (m), roll, pitch, yaw (rad), openness 0 … 1."""
    from scipy.spatial.transform import Rotation  # takes a while

    turn = Rotation.from_matrix(matrix(seen.tip[3:]) @ POINTS_DOWN.T).as_euler("xyz")
    return np.array([*seen.tip[:3], *turn, 1 - _closed(seen, scene, wide=1)])


def google_state(seen: Seen, scene: Scene) -> Float[np.ndarray, "8"]:
    """As fractal's `base_pose_tool_reached` and `gripper_closed`: place (m), quaternion x, y, z, w, 0 … 1."""
    w, x, y, z = seen.tip[3:]
    return np.array([*seen.tip[:3], x, y, z, w, _closed(seen, scene, wide=0)])


STATES = {"widowx": widowx_state, "google": google_state}


def _column(task: str) -> str:
    return COLUMNS.get(task, DRAWERS)


def _group(outcome: Outcome) -> tuple[str, str, str]:
    """What means are taken of: column, part of it, setting."""
    task = TASKS[outcome["task"]]
    part = task.kind if _column(task.name) == DRAWERS else ""
    return _column(task.name), part, outcome["setting"]


def _vector(names: Sequence[str], units: Sequence[str], relative: Sequence[bool]) -> Vector:
    return replace(Vector.plain(names, units=units), relative=list(relative))


@dataclass
class SimplerBenchmark(Benchmark):
    """What both robots share."""

    name: ClassVar[str]
    official: ClassVar[Sequence[str]]  # tasks
    published: ClassVar[Mapping[str, tuple[Mapping[str, float], str, str]]]  # %, by column; score; source

    simpler_root: str | None = None
    tasks: list[str] = field(default_factory=list)
    repeats: int = 1
    starts: int | None = None
    max_steps: int | None = None
    camera: str = "image"

    def __post_init__(self) -> None:
        for key in ("repeats", "starts", "max_steps"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be 1 or more")
        known = [name for name, task in TASKS.items() if task.robot.startswith(self.name.lower())]
        for task in self.tasks:
            choose("tasks", task, known)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"tasks={self.tasks}: name one or more, none of them twice")

    def table(self, task: str) -> list[Start]:
        """All starts of a task."""
        return episodes(task)

    def chosen(self) -> list[Start]:
        """All of the tasks, or of each so many, evenly spread."""
        tables = [self.table(task) for task in self.tasks]
        counts = [min(self.starts or len(table), len(table)) for table in tables]
        return [table[i * len(table) // n] for table, n in zip(tables, counts) for i in range(n)]

    def episodes(self, seed: int) -> list[Trial]:
        """All starts, then all again: the same for every seed."""
        starts = self.chosen()
        tried = [(start, repeat) for repeat in range(self.repeats) for start in starts]
        return [Trial(index, *each) for index, each in enumerate(tried)]

    def environment(self) -> SimplerEnvironment:
        assert self.simpler_root is not None  # `prepare` asks for it
        return SimplerEnvironment(Path(self.simpler_root), self.camera, self.max_steps, self.traced)

    @property
    def traced(self) -> bool:
        """Some pictures are ray-traced."""
        return False

    @property
    def pictures(self) -> str:
        """How they are drawn, for the record."""
        return "raster, drawers ray-traced" if self.traced else "raster"

    def prepare(self, share: int = 0) -> Simulation:
        if self.simpler_root is None:
            raise UserError(f"simpler_root=: not given; {check.CLONE}")
        check.check_packages()
        check.check_assets(Path(self.simpler_root), [TASKS[task] for task in self.tasks], self.chosen())
        caveat = RASTER if DRAWERS in self.columns and not self.traced else None
        # One process per core: threads of Mesa's CPU driver would only be in each other's way.
        variables = {"LP_NUM_THREADS": "1"}
        renderer = f"SAPIEN 3, {check.drawing(traced=self.traced)}, {self.pictures}"
        return Simulation(self.environment, renderer, self.pictures, caveat, variables)

    # ------------------------------------------------------------ what comes of it

    @property
    def scores(self) -> Sequence[str]:
        return (EVER, LAST)

    def value(self, outcome: Outcome, score: str) -> bool:
        return outcome["success"] if score == LAST else outcome["first_success"] is not None

    def reached(self, outcome: Outcome, score: str) -> list[bool]:
        return [_column(outcome["task"]) == each and self.value(outcome, score) for each in self.columns]

    def attempts(self, outcome: Outcome, score: str) -> Iterable[tuple[str, bool]]:
        """Cans by how they lie."""
        lies = next((f", {lies}" for lies in CAN_LIES if lies in outcome["setting"]), "")
        return [(outcome["task"] + lies, self.value(outcome, score))]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(map(_column, self.tasks)))

    def summarise(self, outcomes: Sequence[Outcome], score: str) -> Summary:
        """Means of means. The values are weighted so that their mean is the average; that of a start stands
        at its first repeat: repeats are no trials of their own, neither for intervals nor for comparisons."""
        found = super().summarise(outcomes, score)
        groups = list(map(_group, outcomes))
        hits, weights = np.array(found["values"], float), nested_weights(groups)
        starts = [(outcome["task"], outcome["start"]) for outcome in outcomes]
        first = {start: index for index, start in reversed(list(enumerate(starts)))}
        units = np.array([first[start] for start in starts])
        average = weighted_rate(hits, weights, units)
        found["average"], found["interval"] = average["rate"], average["interval"]
        places = [np.array([group[0] == column for group in groups]) for column in self.columns]
        found["success"] = [weighted_rate(hits[place], weights[place], units[place]) for place in places]
        found["values"] = np.bincount(units, hits * weights * len(hits), len(hits)).tolist()
        return found

    def protocol(self, episodes: Sequence[Any], seed: int) -> dict[str, Any]:
        return {
            "benchmark": name_of(type(self)),
            "episode_set": VISUAL_MATCHING,
            "tasks": list(self.tasks),
            "repeats": self.repeats,
            "starts": self.starts,
            "max_steps": self.max_steps,
            "pictures": self.pictures,
            "episodes": len(episodes),
        }

    def about(self, protocol: Mapping[str, Any], seed: int) -> About:
        tasks, limit, few = protocol["tasks"], protocol["max_steps"], protocol["starts"]
        columns = dict.fromkeys(map(_column, tasks))
        official = set(tasks) >= {task for task in self.official if _column(task) in columns}
        official &= protocol["episode_set"] == VISUAL_MATCHING and not (limit or few)
        beside = [
            Published(method, float(np.mean([figures[column] for column in columns])) / 100, score, source)
            for method, (figures, score, source) in self.published.items()
            if official and columns.keys() <= figures.keys()
        ]
        tried = f"{len(tasks)} tasks, {few or 'all'} starts of each {protocol['repeats']} ×"
        cut = f", cut at {limit} steps" if limit else ""
        return About(
            name_of(type(self)),
            f"SIMPLER, {self.name}, {protocol['episode_set']}: {protocol['episodes']} episodes, {tried}{cut}",
            score="success at",
            score_in_full="success at",
            percent=[EVER, LAST, NOT_STATED],
            columns={column: LONG.get(column, column) for column in columns},
            note=NOTE,
            tasks_note=f"Solved of tried at the last step. Published, %: {self._figures()}.",
            incomparable="" if beside else f"No published average is of these tasks and episodes{cut}.",
            published=beside,
            published_note="Means of the tasks' published figures, by other simulators' physics and pictures "
            "(SAPIEN 2).",
            agents=dict(self.agents),
            fps=self.robot.fps,
        )

    def _figures(self) -> str:
        return "; ".join(
            f"{method} {', '.join(f'{column} {figure:g}' for column, figure in figures.items())} ({source})"
            for method, (figures, _, source) in self.published.items()
        )


MOVES = ["x", "y", "z", "rx", "ry", "rz", "gripper"]


def _actions(relative_gripper: bool) -> Vector:
    """Changes of pose along the base's axes. low, high: of random actions; a policy is not held to them."""
    vector = _vector(MOVES, ["m"] * 3 + ["rad"] * 3 + [""], [True] * 6 + [relative_gripper])
    vector.high = [0.02] * 3 + [0.05] * 3 + [1.0]
    vector.low = [-high for high in vector.high]
    return vector


@dataclass
class WidowX(SimplerBenchmark):
    """Four tasks of 24 starts. The gripper's action is absolute: 1 opens, −1 closes."""

    name = "WidowX"
    official = tuple(name for name, task in TASKS.items() if task.robot.startswith("widowx"))
    published = {
        "Octo-base": ({"spoon": 12.5, "carrot": 8.3, "cube": 0.0, "eggplant": 43.1}, LAST, AUTHORS),
        "starVLA-GR00T": (
            {"spoon": 75.0, "carrot": 59.4, "cube": 18.8, "eggplant": 100.0},
            NOT_STATED,
            "starVLA, self-reported",
        ),
    }

    tasks: list[str] = field(default_factory=lambda: list(WidowX.official))
    repeats: int = 3
    camera: str = "image_0"

    @property
    def robot(self) -> Robot:
        names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
        state = _vector(names, ["m"] * 3 + ["rad"] * 3 + [""], [False] * 7)
        return Robot([self.camera], _actions(False), state, fps=5, gripper=Gripper(6))


@dataclass
class Google(SimplerBenchmark):
    """Coke can, move near, drawers. The gripper's action is a change: 1 closes, −1 opens, 0 holds."""

    name = "Google"
    official = tuple(name for name, task in TASKS.items() if task.robot == "google")
    published = {
        "RT-1": ({"coke can": 85.7, "move near": 44.2, DRAWERS: 73.1}, LAST, AUTHORS),
        "RT-1-X": ({"coke can": 56.7, "move near": 31.7, DRAWERS: 59.4}, LAST, AUTHORS),
        "Octo-base": ({"coke can": 17.0, "move near": 4.2, DRAWERS: 22.7}, LAST, AUTHORS),
        "DeFI": ({"coke can": 54.2}, NOT_STATED, "a third party's table"),
    }

    tasks: list[str] = field(
        default_factory=lambda: [each for each in Google.official if not each.endswith("near_v1")]
    )
    variants: bool = False
    shader: str = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("shader", self.shader, ("raster", "rt"))

    @property
    def traced(self) -> bool:
        return self.shader == "rt" and DRAWERS in self.columns

    @property
    def robot(self) -> Robot:
        names = ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper_closed"]
        state = _vector(names, ["m"] * 3 + [""] * 5, [False] * 8)
        return Robot([self.camera], _actions(True), state, fps=3, gripper=Gripper(6, opens=False))

    def table(self, task: str) -> list[Start]:
        return variants_of(task) if self.variants else episodes(task)

    def protocol(self, episodes: Sequence[Any], seed: int) -> dict[str, Any]:
        own = {"episode_set": "variant aggregation"} if self.variants else {}
        return super().protocol(episodes, seed) | own
