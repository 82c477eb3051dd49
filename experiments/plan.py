"""A suite's arms as steps: commands with settings, each known by all that decides what it makes.

configs/experiments.yaml names the steps of all arms, a suite's file what its arms do otherwise. A step is
known by its command, this package's version, and all that the command reads, defaults of configs/ included:
where these are those of another step it is that step, and runs once.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import import_module
from typing import Any

from omegaconf import OmegaConf

import defi
from defi.config import compose, flatten, typed
from defi.errors import UserError

END = "rollout"  # the step whose results are compared


@dataclass
class ArmConfig:
    """steps: what it does otherwise; a step that names its command (`run`) is another one altogether.

    published: the paper's figure. against: the arm that it is compared with; None: the first.
    at, lines: its place on the axis of a curve, and which curves go through it.
    """

    title: str
    steps: dict[str, Any] = field(default_factory=dict)
    published: float | None = None
    against: str | None = None
    at: float | None = None
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A command and its settings, in which "@<key>" stands for the output of another step.

    how: settings that change no result. seconds: expected on two cores.
    """

    name: str
    run: str
    settings: Mapping[str, Any]
    how: Mapping[str, Any]
    inputs: tuple["Step", ...]
    seconds: float
    key: str

    def all(self) -> Iterator["Step"]:
        """What it needs, and itself, in an order in which they can run; some come more than once."""
        for step in self.inputs:
            yield from step.all()
        yield self


@dataclass(frozen=True)
class Run:
    """An arm trained with one seed, as its last step."""

    arm: str
    seed: int
    last: Step


def read_arms(section: Mapping[str, Any]) -> dict[str, ArmConfig]:
    """The arms of a suite, by name. Raises UserError for one that is compared with none of them."""
    arms = {name: typed(ArmConfig, arm, f"arms.{name}") for name, arm in section.items()}
    for name, arm in arms.items():
        if arm.against is not None and arm.against not in arms:
            raise UserError(f"arms.{name}.against={arm.against}: no such arm; there are {', '.join(arms)}")
    return arms


def build_runs(steps: Mapping[str, Any], arms: Mapping[str, ArmConfig], seeds: Iterable[int]) -> list[Run]:
    """All arms with the first seed, then with the next: what is there early says something of every arm."""
    changed = {name: change(steps, arm.steps) for name, arm in arms.items()}
    return [Run(name, seed, build(END, changed[name], seed)) for seed in seeds for name in arms]


def distinct_steps(runs: Iterable[Run]) -> dict[str, Step]:
    """All steps by key, each after what it needs."""
    return {step.key: step for run in runs for step in run.last.all()}


def change(steps: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The steps of an arm."""
    kept = {name: step for name, step in steps.items() if "run" not in changes.get(name, {})}
    return OmegaConf.to_container(OmegaConf.merge(kept, changes))


def build(name: str, steps: Mapping[str, Any], seed: int, above: tuple[str, ...] = ()) -> Step:
    """A step of an arm with all that it needs. UserError for one that is missing, or needs itself."""
    if name not in steps or name in above:
        way = " ← ".join((name, *reversed(above)))
        raise UserError(f"steps.{name}: {'needs itself' if name in above else 'no such step'} ({way})")
    section = dict(steps[name])
    run, seconds, how = section.pop("run"), section.pop("seconds"), section.pop("how", {})
    choices = section.pop("choose", {})
    settings, inputs = {**choices, **flatten(section)}, {}
    for setting, value in settings.items():
        if value == "@seed":
            settings[setting] = seed
        elif isinstance(value, str) and value.startswith("@"):
            needed = value[1:]
            inputs[needed] = inputs.get(needed) or build(needed, steps, seed, (*above, name))
            settings[setting] = f"@{inputs[needed].key}"
    said = {key.lstrip("+"): value for key, value in settings.items() if key not in choices}
    decides = [run, defi.__version__, defaults(run, tuple(arguments(choices, {}))) | said]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    start, *factors = (float(Fraction(str(each))) for each in seconds)
    share, trains = float(settings.get("data.share", 1)), settings.get("trainer.max_steps") != 0
    expected = start + math.prod(factors) * share * trains
    return Step(name, run, settings, how, tuple(inputs.values()), expected, f"{name}-{digest}")


def entry_point(run: str) -> Callable[[], None]:
    """The function of `python -m <run>`."""
    module = import_module(run)
    return getattr(module, "main", None) or import_module(f"{run}.__main__").main


@functools.cache
def defaults(run: str, choices: tuple[str, ...]) -> dict[str, Any]:
    """What a command reads where it is told nothing but these files of configs/: one that changes there is a
    setting that changes."""
    cfg = compose(vars(entry_point(run))["config_name"], *choices)
    return flatten(OmegaConf.to_container(cfg))


def arguments(settings: Mapping[str, Any], places: Mapping[str, str]) -> list[str]:
    """Settings as a command line has them; `places`: of the outputs of steps, by key."""
    return [f"{key}={_text(value, places)}" for key, value in settings.items()]


def _text(value: Any, places: Mapping[str, str]) -> str:
    if value == "@cores":
        return str(len(os.sched_getaffinity(0)))
    if isinstance(value, str) and value.startswith("@"):
        value = places[value[1:]]
    plain = isinstance(value, str) and value and all(c.isalnum() or c in "_-./" for c in value)
    return value if plain else json.dumps(value, ensure_ascii=False)
