"""The numbers of a training run, as `configs/trainer/*.yaml` states them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from defi.config import typed
from defi.errors import UserError

SCHEDULES = ("constant", "tri_stage")
PRECISIONS = ("no", "fp16", "bf16")
MATMULS = ("highest", "high", "medium")


@dataclass(frozen=True)
class TrainerConfig:
    """One run of the loop. Steps are optimizer steps; an interval of 0 means never.

    The *global* batch is what the user states: samples per optimizer step over all processes. It is split
    into processes × micro-batch × accumulation.
    """

    global_batch: int = 8
    micro_batch: int | None = None  # samples per process and forward pass; None: global_batch / processes
    max_steps: int | None = 1000
    epochs: int | None = None  # beside max_steps: what is reached first ends the run
    passes: int = 1  # over the data that count as one epoch

    lr: float = 1e-4  # peak
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0  # of all trained parameters
    clip: float | None = 1.0  # largest gradient norm
    schedule: str = "constant"
    warmup: float = 0.0  # constant: share of the steps with linearly rising rate
    phases: tuple[float, float, float] = (0.02, 0.08, 0.9)  # tri_stage: shares of warm-up, hold, cosine
    start_scale: float = 0.1  # tri_stage: first rate / lr
    end_scale: float = 1e-6  # tri_stage: last rate / lr

    ema: float | None = None  # decay of the averaged weights; None: off
    precision: str = "no"
    matmul: str = "highest"  # of float32 matrix products, as in torch.set_float32_matmul_precision
    workers: int = 0  # loader processes per training process

    skip_nonfinite: int = 0  # steps that may be left out because their loss or gradient is not finite
    bad_samples: float = 0.0  # share of samples that may be replaced because they cannot be read

    log_every: int = 10
    save_every: int = 500
    sample_every: int = 0
    rollout_every: int = 0
    keep: int = 2  # newest checkpoints kept
    best_metric: str | None = None  # evaluation metric whose largest value is kept too

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "phases", tuple(self.phases))
        for name in ("global_batch", "passes", "log_every", "keep"):
            self._demand(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("max_steps", "epochs", "micro_batch"):
            least = getattr(self, name)
            self._demand(name, least is None or least >= 1, "must be at least 1, or null")
        self._demand("max_steps", (self.max_steps or self.epochs) is not None, "give it or trainer.epochs")
        for name in (
            "workers",
            "save_every",
            "sample_every",
            "rollout_every",
            "weight_decay",
            "skip_nonfinite",
        ):
            self._demand(name, getattr(self, name) >= 0, "must not be negative")
        self._demand("lr", self.lr > 0, "must be positive")
        self._demand(
            "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"
        )
        self._demand("clip", self.clip is None or self.clip > 0, "must be positive, or null for no clipping")
        self._demand("schedule", self.schedule in SCHEDULES, f"choose one of {', '.join(SCHEDULES)}")
        self._demand("precision", self.precision in PRECISIONS, f"choose one of {', '.join(PRECISIONS)}")
        self._demand("matmul", self.matmul in MATMULS, f"choose one of {', '.join(MATMULS)}")
        self._demand("warmup", 0 <= self.warmup <= 1, "is a share of the steps, in [0, 1]")
        self._demand("phases", self._are_phases(), "three shares that sum to 1")
        self._demand("bad_samples", 0 <= self.bad_samples < 1, "is a share of the samples, in [0, 1)")
        self._demand("ema", self.ema is None or 0 < self.ema < 1, "must lie in (0, 1), or null for none")

    def _are_phases(self) -> bool:
        return len(self.phases) == 3 and min(self.phases) >= 0 and abs(sum(self.phases) - 1) < 1e-6

    def _demand(self, name: str, fine: bool, rule: str) -> None:
        if not fine:
            raise UserError(f"trainer.{name}={getattr(self, name)}: {rule}")

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> "TrainerConfig":
        """Build from the `trainer` section of a configuration.

        Raises:
            UserError: an unknown key or an impossible value.
        """
        return typed(cls, section, "trainer")

    def for_samples(self, count: int) -> "TrainerConfig":
        """The same with `max_steps` as a number, on a data set of `count` samples.

        The last batch of an epoch is filled up, as loaders with `drop_last=False` under accelerate do:
        ⌈passes · count / global_batch⌉ steps per epoch.
        """
        if self.epochs is None:
            return self
        steps = self.epochs * math.ceil(self.passes * count / self.global_batch)
        return replace(self, max_steps=min(steps, self.max_steps or steps))

    def split_batch(self, processes: int) -> tuple[int, int]:
        """(micro-batch, accumulation) such that processes × micro-batch × accumulation = global batch.

        Raises:
            UserError: the global batch cannot be divided that way.
        """
        per_process, rest = divmod(self.global_batch, processes)
        if rest or per_process == 0:
            raise UserError(
                f"trainer.global_batch={self.global_batch}: not divisible by {processes} processes; "
                f"choose a multiple of {processes}"
            )
        micro = min(self.micro_batch or per_process, per_process)
        if per_process % micro:
            raise UserError(
                f"trainer.micro_batch={micro}: does not divide the {per_process} samples per process; "
                f"choose a divisor of {per_process}"
            )
        return micro, per_process // micro


def run_settings(cfg: DictConfig) -> dict[str, Any]:
    """What `train` takes from the settings that every training command has."""
    keys = ("output", "seed", "resume", "overwrite", "tracker")
    return {"config": OmegaConf.to_container(cfg, resolve=True)} | {key: cfg[key] for key in keys}
