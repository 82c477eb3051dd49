"""What goes between the policy's process and the simulators'."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from defi.errors import UserError

Actions = Float[np.ndarray, "K 7"]


@dataclass(frozen=True)
class Trial:
    """A chain of tasks to solve one after the other, how they are asked for, and where the world starts."""

    index: int
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    robot_obs: Float[np.ndarray, "15"]
    scene_obs: Float[np.ndarray, "24"]


@dataclass(frozen=True)
class Look:
    """What the policy is shown. `seed` is (run seed, chain, look): all that its noise may depend on."""

    seed: tuple[int, int, int]
    task: str
    instruction: str
    images: Mapping[str, UInt8[np.ndarray, "H W 3"]]


@dataclass(frozen=True)
class Clip:
    """Pictures of one attempt at a task, by camera: uint8 [F,H,W,3]."""

    chain: int
    position: int
    task: str
    instruction: str
    solved: bool
    images: Mapping[str, UInt8[np.ndarray, "F H W 3"]]


@dataclass(frozen=True)
class ChainResult:
    """A finished chain. `steps` has the control steps per attempted task, None where it was not solved."""

    index: int
    tasks: tuple[str, ...]
    steps: tuple[int | None, ...]
    control_steps: int
    looks: int
    seconds: float


Judge = Callable[[str, Any, Any], bool]
"""(task, state at its start, state now) → solved?"""


AGENTS = ("policy", "random", "expert")


@dataclass(frozen=True)
class Setup:
    """What a simulator process is told once.

    Args:
        make_world: returns a `defi.sim.world.World`, or something that behaves like one.
        agent: who acts, one of `AGENTS`; the policy is asked over the connection, the others act here.
        fresh: load the world anew before each chain. Bullet's contact order remembers what ran before
            in the same world, so only then does a chain not depend on those before it.
        limit: control steps per task.
        recorded: indices of the chains to keep clips of, a picture every `record_every` control steps.
        environment: variables that the process is started with.
    """

    make_world: Callable[[], Any]
    judge: Judge
    agent: str
    seed: int
    limit: int
    fresh: bool = True
    recorded: frozenset[int] = frozenset()
    record_every: int = 3
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a simulator process gave up: a line for the user, or the traceback of a fault in the code."""

    message: str
    user: bool

    def error(self, chain: int) -> Exception:
        """To be raised in the policy's process."""
        if self.user:
            return UserError(self.message)
        return RuntimeError(f"chain {chain}: fault in a simulator process\n{self.message}")
