"""The settings of a rollout beside those of its benchmark, and whether a policy fits the benchmark's robot.

configs/step3_rollout.yaml says what each setting is for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from defi.benchmarks.adapters import adapt, adapted, adapters_between
from defi.benchmarks.benchmark import Benchmark
from defi.benchmarks.find import find_benchmark
from defi.config import typed
from defi.errors import UserError, choose
from defi.processes import print_once
from defi.robot.spec import Robot
from Step3_DeFI.acting import PolicySettings
from Step3_DeFI.config import PolicyConfig


@dataclass
class VideoConfig:
    """Clips of the first `chains` episodes, a picture every `every` control steps."""

    chains: int = 8
    every: int = 3

    def __post_init__(self) -> None:
        if self.chains < 0 or self.every < 1:
            given = f"videos.chains={self.chains} videos.every={self.every}"
            raise UserError(f"{given}: must be at least 0 and 1")


@dataclass
class RolloutConfig:
    """How a benchmark is run. Everything that changes a result is recorded in results.json.

    adapters: None until the policy is known: then as its robot and the benchmark's say (`settle_adapters`).
    """

    benchmark: str = "table"
    seed: int = 0
    chunk: int | None = None
    batch: int = 1
    processes: int | None = None
    baseline: str | None = None
    adapters: list[str] | None = None
    videos: VideoConfig = field(default_factory=VideoConfig)

    def __post_init__(self) -> None:
        for key in ("batch", "processes", "chunk"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be 1 or more")
        adapt(self.adapters or ())  # are there such ones?

    def check_agents(self, benchmark: Benchmark) -> None:
        """Raises UserError for agents that the benchmark does not have."""
        choose("baseline", self.baseline, (None, *benchmark.agents))
        if self.baseline is not None:
            benchmark.agent(self.baseline)


@dataclass
class CommandConfig(RolloutConfig, PolicySettings):
    """A rollout as a command: who acts, and where the result goes."""

    agent: str = "policy"
    policy: str | None = None
    policy_keys: Any = None
    threads: int | None = None
    output: str = "outputs/rollout"
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        RolloutConfig.__post_init__(self)
        PolicySettings.__post_init__(self)
        if self.agent == "policy" and self.checkpoint is None and self.policy is None:
            raise UserError("checkpoint=: not given; name a stage-3 run's output folder, or agent=random")
        if self.policy and (given := self.given()):
            raise UserError(f"policy={self.policy}: leave {next(iter(given))}= to the server")
        if self.baseline == self.agent:
            raise UserError(f"baseline={self.baseline}: the same as agent; leave one of them out")

    def check_agents(self, benchmark: Benchmark) -> None:
        super().check_agents(benchmark)
        choose("agent", self.agent, ("policy", *benchmark.agents))
        if self.agent != "policy":
            benchmark.agent(self.agent)


Config = TypeVar("Config", bound=RolloutConfig)


def read_settings(cls: type[Config], settings: DictConfig, where: str) -> tuple[Benchmark, Config]:
    """The benchmark that the settings name, made of those that are its own, and how to run it.

    Raises:
        UserError: no such benchmark, a setting of another type, or one that does not fit the others.
    """
    kind = find_benchmark(settings["benchmark"])
    own = {field.name for field in fields(kind)}
    if twice := own & ({field.name for field in fields(CommandConfig)} | set(dir(Benchmark))):
        fix = f"its {min(twice)} means something else here; rename it"
        raise UserError(f"benchmark={settings['benchmark']}: {fix}")
    others = [key for key in settings if key not in own]
    config = typed(cls, OmegaConf.masked_copy(settings, others), where)
    benchmark = typed(kind, OmegaConf.masked_copy(settings, list(own)), where)
    config.check_agents(benchmark)
    return benchmark, config


def settle_adapters(config: RolloutConfig, robot: Robot, simulated: Robot) -> list[str]:
    """The adapters between a policy's robot and the benchmark's: as the settings say, else as the robots do,
    which is printed."""
    if config.adapters is None:
        config.adapters = adapters_between(robot, simulated)
        names = ",".join(config.adapters)
        print_once(f"adapters=[{names}]: from the policy's actions to the simulators'" if names else "")
    return config.adapters


def check_robot(
    policy: PolicyConfig, simulated: Robot, source: str, adapters: Sequence[str] = ()
) -> list[str]:
    """As `compare_robots`, of a checkpoint's policy.

    Raises:
        UserError: it cannot act there: a camera is missing, or its actions or state have another size.
    """
    robot, state = policy.robot, simulated.state
    differ = [f"no camera {camera}" for camera in robot.cameras if camera not in simulated.cameras]
    sizes = {"actions": (policy.action_dim, len(simulated.actions))}
    sizes |= {"state": (policy.state_dim, len(state or ()))} if policy.state else {}
    differ += [f"{what} of {its} numbers, not {own}" for what, (own, its) in sizes.items() if own != its]
    if differ:
        fix = "give a policy of the benchmark's robot"
        have = f"is of another robot than the simulators', which have {'; '.join(differ)}"
        raise UserError(f"{source}: {have}; {fix}")
    return compare_robots(robot, simulated, source, adapters)


def compare_robots(robot: Robot, simulated: Robot, source: str, adapters: Sequence[str]) -> list[str]:
    """In what a policy's robot, behind adapters, is not quite the benchmark's (names, units, rates, gripper);
    it is also printed, with the adapters that would mend it."""
    other = adapted(robot, adapters).differences(replace(simulated, cameras=robot.cameras))
    needed = adapters_between(robot, simulated)
    fix = f"; adapters=[{','.join(needed)}] lie between them" if needed != list(adapters) else ""
    print_once(f"{source}: its robot is not quite the simulators': {'; '.join(other)}{fix}" if other else "")
    return other
