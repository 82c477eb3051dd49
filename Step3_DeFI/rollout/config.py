"""Settings of a rollout; configs/step3_rollout.yaml says what each is for."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from defi.errors import UserError
from Step3_DeFI.config import PRECISIONS
from Step3_DeFI.diffusion import SAMPLERS

AGENTS = {"policy": "DeFI", "random": "random actions", "scripted": "scripted policy"}


def choose(key: str, value: Any, choices: Iterable[str | None]) -> None:
    """Raises UserError if a setting is none of its choices."""
    if value not in choices:
        names = ", ".join("null" if choice is None else choice for choice in choices)
        raise UserError(f"{key}={value}: must be one of {names}")


@dataclass
class SimConfig:
    """Which world. calvin_root: a clone of the CALVIN repository; None for the built-in table.

    renderer: of `defi.sim.renderers.KINDS`; None for `default_kind`.
    """

    calvin_root: str | None = None
    backend: str = "native"
    world: str = "fresh"
    renderer: str | None = None
    renderer_fallback: bool = False
    instructions: str | None = None
    static_size: int | None = None
    gripper_size: int | None = None

    def __post_init__(self) -> None:
        choose("sim.world", self.world, ("fresh", "persistent"))
        choose("sim.backend", self.backend, ("native", "calvin_env"))
        if self.backend == "calvin_env" and self.calvin_root is None:
            raise UserError("sim.backend=calvin_env: name the clone of CALVIN too (sim.calvin_root=…)")
        if self.backend == "calvin_env" and (self.static_size or self.gripper_size):
            raise UserError("sim.static_size, sim.gripper_size: calvin_env draws the scene's own sizes only")


@dataclass
class VideoConfig:
    """Clips of the first `chains` chains, a picture every `every` control steps."""

    chains: int = 8
    every: int = 3

    def __post_init__(self) -> None:
        if self.chains < 0 or self.every < 1:
            raise UserError(
                f"videos.chains={self.chains} videos.every={self.every}: must be at least 0 and 1"
            )


@dataclass
class RolloutConfig:
    """One evaluation. Everything that changes a result is recorded in results.json."""

    scene: str = "D"
    chains: int = 1000
    length: int = 5
    tasks: list[str] | None = None
    max_steps: list[int] = field(default_factory=lambda: [360, 720])
    seed: int = 0
    chunk: int | None = None
    batch: int = 1
    processes: int | None = None
    baseline: str | None = None
    sim: SimConfig = field(default_factory=SimConfig)
    videos: VideoConfig = field(default_factory=VideoConfig)

    def __post_init__(self) -> None:
        for key in ("chains", "length", "batch", "processes", "chunk"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be 1 or more")
        if not self.max_steps or min(self.max_steps) < 1:
            raise UserError(f"max_steps={self.max_steps}: name one or more limits of control steps per task")
        self.max_steps = sorted(set(self.max_steps))
        choose("baseline", self.baseline, (None, "random", "scripted"))


@dataclass
class CommandConfig(RolloutConfig):
    """A rollout as a command: who acts, and where the result goes."""

    agent: str = "policy"
    checkpoint: str | None = None
    gfdm: str | None = None
    gidm: str | None = None
    sampler: str | None = None
    sampler_steps: int | None = None
    guidance: float | None = None
    precision: str | None = None
    threads: int | None = None
    output: str = "outputs/rollout"
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("agent", self.agent, AGENTS)
        choose("sampler", self.sampler, (None, *SAMPLERS))
        choose("precision", self.precision, (None, *PRECISIONS))
        if self.agent == "policy" and self.checkpoint is None:
            raise UserError(
                "checkpoint=: not given; name the output folder of a stage-3 run, or agent=random"
            )
        if "scripted" in (self.agent, self.baseline) and self.sim.calvin_root is not None:
            raise UserError("scripted: knows the built-in tables only; use sim=builtin, or another agent")
        if self.baseline == self.agent:
            raise UserError(f"baseline={self.baseline}: the same as agent; leave one of them out")
