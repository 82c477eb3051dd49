"""What a benchmark is: episodes, environments to run them in, and what their outcomes add up to.

A `Benchmark` is a dataclass whose fields are its settings. Everything else is shared and knows no benchmark
by name: processes, batches, resuming, clips, statistics, reports, comparisons (`Step3_DeFI.rollout`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from defi.benchmarks.statistics import Rate, Summary, mean_interval, rate
from defi.errors import choose
from defi.robot.spec import Robot

Observation = Mapping[str, Any]
"""As a policy takes it: images: camera → uint8 [H, W, 3]; instruction: a sentence; state: [S], if any."""
Outcome = Mapping[str, Any]  # of an episode, as JSON has it
Actions = Float[np.ndarray, "K A"]
Seed = tuple[int, int, int]  # (run, episode, observation): all that a random number may depend on


@dataclass(frozen=True)
class Episode:
    """What an environment needs to start one; benchmarks add fields. `index` counts them from 0.

    world: where it costs nothing else, a process gets episodes of the same world one after the other.
    """

    index: int
    world = ""  # no field: a property, where there are several


@dataclass(frozen=True)
class Step:
    """What came of a control step.

    over: the episode ends here. look: something else is asked for from here on, so the policy must look again
    and the rest of its chunk is not carried out. solved: where one of both holds, whether what was asked for
    until now was done.
    """

    over: bool = False
    look: bool = False
    solved: bool = False


class Environment(ABC):
    """A robot in a simulated (or real) world. Made and used within one process."""

    task: str = "task"  # short name of what is asked for now, for names of clips and for tables

    @abstractmethod
    def reset(self, episode: Any) -> None:
        """Begin one of the benchmark's episodes; what ran before must not matter."""

    @abstractmethod
    def observe(self) -> Observation:
        """What the policy is shown now. Pictures are drawn here, and nowhere else."""

    @abstractmethod
    def step(self, action: Float[np.ndarray, " A"]) -> Step:
        """One control step, the action in the units of the benchmark's robot. It ends every episode once."""

    @abstractmethod
    def outcome(self) -> Outcome:
        """What is kept of an episode that is over: numbers, texts, lists and dicts of them."""

    def close(self) -> None:  # noqa: B027  most have nothing to close
        """Free what it holds; it is not used after that."""


Agent = Callable[[Any, Seed], Actions]  # (environment, seed) → what to do next


@dataclass(frozen=True)
class Simulation:
    """How environments are made on this machine, after a look at it.

    make: called in every simulator process, so it is pickled.
    renderer: what draws, for the record. kind: of it; all processes of a run must have the same.
    caveat: what of this machine keeps the numbers from being compared with published ones.
    variables: of the processes' environment.
    """

    make: Callable[[], Environment]
    renderer: str = ""
    kind: str = ""
    caveat: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Published:
    """A figure to stand beside: of which method, measured how (as a score is named), and where it is from."""

    method: str
    figure: float
    score: str
    source: str


@dataclass
class About:
    """What results say about their benchmark, so that they can be shown and compared without it.

    benchmark: package.module:Class. title: what was measured, in a line.
    episode, episodes, scores: what these are called; keys of results.json too.
    score, score_in_full: heads of the column that names the score, short and long.
    figure, headline: the average, as the head of a column and of a single number.
    percent: the scores that are shares of 1.
    columns: of success rates beside the average: short head → long head. first: of the first one, alone.
    several: key of the protocol that lists scores; to be compared, two results need one in common.
    note, tasks_note: what the tables mean. fps: control steps per second, for clips.
    incomparable: why no published figure may stand beside; else `published` may, as published_note says.
        Without both, reports say nothing of published figures.
    agents: names → words.
    """

    benchmark: str
    title: str
    episode: str = "episode"
    episodes: str = "episodes"
    scores: str = "scores"
    score: str = "score"
    score_in_full: str = "score"
    figure: str = "success rate"
    headline: str = "success rate"
    percent: list[str] = field(default_factory=lambda: ["success"])
    columns: dict[str, str] = field(default_factory=dict)
    first: str = ""
    several: str = ""
    note: str = "The intervals are 95 %: Wilson's for rates, bootstrap over episodes for other averages."
    tasks_title: str = "Per task"
    tasks_note: str = "Solved of tried."
    incomparable: str = ""
    published: list[Published] = field(default_factory=list)
    published_note: str = ""
    agents: dict[str, str] = field(default_factory=dict)
    fps: float | None = None

    def number(self, value: float, score: str) -> str:
        """A figure for people."""
        return f"{100 * value:.1f} %" if score in self.percent else f"{value:.2f}"


@dataclass
class Benchmark(ABC):
    """What to try a policy on. Its fields are its settings: of types that YAML has, each with a default."""

    agents: ClassVar[Mapping[str, str]] = {"random": "random actions"}  # beside the policy: names → words

    # ------------------------------------------------------------ what is run

    @property
    @abstractmethod
    def robot(self) -> Robot:
        """What the environments show and take; a policy of another robot is refused."""

    @abstractmethod
    def episodes(self, seed: int) -> Sequence[Episode]:
        """All episodes, numbered 0, 1, …: the same seed gives the same ones."""

    @abstractmethod
    def environment(self) -> Environment:
        """A new environment: called in a simulator process, on a copy of this benchmark that was pickled."""

    def prepare(self, share: int) -> Simulation:
        """How this machine makes environments, for process `share` of `accelerate launch`.

        Raises:
            UserError: something that is needed is not there.
        """
        return Simulation(self.environment)

    def agent(self, name: str) -> Agent:
        """One of `agents`, which acts beside its environment in a simulator process."""
        choose("agent", name, self.agents)
        return self.act_at_random

    def act_at_random(self, environment: Environment, seed: Seed) -> Actions:
        """One action, uniform between the robot's `low` and `high`, or −1 and 1: what chance achieves."""
        actions = self.robot.actions
        low, high = actions.low or [-1.0] * len(actions), actions.high or [1.0] * len(actions)
        return np.random.default_rng(seed).uniform(low, high)[None]

    # ------------------------------------------------------------ what comes of it

    @property
    def scores(self) -> Sequence[str]:
        """Names of the figures that one run yields, in the order of the tables; the last is the headline."""
        return ("success",)

    def value(self, outcome: Outcome, score: str) -> float:
        """An episode's share in a score: the figure is the mean. True or False where it is a rate."""
        return outcome["success"]

    def reached(self, outcome: Outcome, score: str) -> Sequence[bool]:
        """Per column of `About.columns`, whether an episode counts for the rate that stands there."""
        return ()

    def attempts(self, outcome: Outcome, score: str) -> Iterable[tuple[str, bool]]:
        """What was tried in an episode, and whether it was solved: the lines of the table of tasks."""
        return [(outcome.get("task", "task"), bool(self.value(outcome, score)))]

    def summarise(self, outcomes: Sequence[Outcome], score: str) -> Summary:
        """One score of all episodes; a benchmark with averages of averages has its own."""
        values = [self.value(outcome, score) for outcome in outcomes]
        if isinstance(values[0], bool):
            average = rate(values)
        else:
            average = Rate(rate=float(np.mean(values)), interval=mean_interval(values))
        columns = zip(*(self.reached(outcome, score) for outcome in outcomes))
        tasks: dict[str, dict[str, int]] = {}
        for outcome in outcomes:
            for task, solved in self.attempts(outcome, score):
                counts = tasks.setdefault(task, {"solved": 0, "tried": 0})
                counts["tried"] += 1
                counts["solved"] += solved
        return {
            "average": average["rate"],
            "interval": average["interval"],
            "success": [rate(column) for column in columns],
            "tasks": dict(sorted(tasks.items())),
            "values": values,
        }

    def protocol(self, episodes: Sequence[Any], seed: int) -> dict[str, Any]:
        """What two evaluations must share for their numbers to be compared."""
        return {"benchmark": name_of(type(self)), **asdict(self), "episodes": len(episodes), "seed": seed}

    def about(self, protocol: Mapping[str, Any], seed: int) -> About:
        """What the results say, for people; it may depend on the arguments only, and on the class."""
        title = f"{protocol['episodes']} episodes of {type(self).__name__}, seed {seed}"
        return About(name_of(type(self)), title, agents=dict(self.agents), fps=self.robot.fps)


def name_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
