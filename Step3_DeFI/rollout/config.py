"""Settings of a rollout; configs/step3_rollout.yaml says what each is for."""

from dataclasses import dataclass, field

from defi.errors import UserError
from Step3_DeFI.rollout.messages import AGENTS


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
        if self.world not in ("fresh", "persistent"):
            raise UserError(f"sim.world={self.world}: must be fresh or persistent")
        if self.backend not in ("native", "calvin_env"):
            raise UserError(f"sim.backend={self.backend}: must be native or calvin_env")
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
        if self.baseline not in (None, *AGENTS[1:]):
            raise UserError(f"baseline={self.baseline}: must be null or one of {', '.join(AGENTS[1:])}")
