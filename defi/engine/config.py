"""The numbers of a training run, as `configs/trainer/*.yaml` states them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from defi.config import typed
from defi.errors import UserError

CHOICES = {
    "schedule": ("constant", "tri_stage"),
    "precision": ("no", "fp16", "bf16"),
    "matmul": ("highest", "high", "medium"),
}
RULES = (  # settings, a rule, and what to say where it does not hold
    ("global_batch passes log_every keep", lambda n: n >= 1, "must be at least 1"),
    ("epochs micro_batch", lambda n: n is None or n >= 1, "must be at least 1, or null"),
    ("max_steps", lambda n: n is None or n >= 0, "must not be negative; 0: the initial weights"),
    ("workers skip_nonfinite weight_decay", lambda n: n >= 0, "must not be negative"),
    ("save_every preview_every rollout_every", lambda n: n >= 0, "must not be negative; 0 means never"),
    ("lr", lambda x: x > 0, "must be positive"),
    ("betas", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b), "two numbers in [0, 1)"),
    ("clip", lambda x: x is None or x > 0, "must be positive, or null for no clipping"),
    ("warmup", lambda x: 0 <= x <= 1, "is a share of the steps, in [0, 1]"),
    ("phases", lambda p: len(p) == 3 and min(p) >= 0 and abs(sum(p) - 1) < 1e-6, "three shares, sum 1"),
    ("bad_samples", lambda x: 0 <= x < 1, "is a share of the samples, in [0, 1)"),
    ("ema", lambda x: x is None or 0 < x < 1, "must lie in (0, 1), or null for none"),
    *((key, known.__contains__, f"choose one of {', '.join(known)}") for key, known in CHOICES.items()),
)


@dataclass(frozen=True)
class TrainerConfig:
    """One run of the loop. Steps are optimizer steps; an interval of 0 means never.

    The *global* batch is what the user states: samples per optimizer step over all processes. It is split
    into processes × micro-batch × accumulation.
    """

    global_batch: int = 8
    micro_batch: int | None = None  # samples per process and forward pass; None: global_batch / processes
    max_steps: int | None = 1000  # 0: nothing is learned, the checkpoint holds the initial weights
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
    preview_every: int = 0
    rollout_every: int = 0
    keep: int = 2  # newest checkpoints kept
    best_metric: str | None = None  # evaluation metric whose largest value is kept too

    def __post_init__(self) -> None:
        for name in ("betas", "phases"):  # lists in YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for names, holds, message in RULES:
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise UserError(f"trainer.{name}={getattr(self, name)}: {message}")
        if self.max_steps is None and self.epochs is None:
            raise UserError("trainer.max_steps=None: give it or trainer.epochs")

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> "TrainerConfig":
        """Build from the `trainer` section of a configuration; UserError for unknown keys and bad values."""
        return typed(cls, section, "trainer")

    def for_samples(self, count: int) -> "TrainerConfig":
        """The same with `max_steps` as a number, on a data set of `count` samples.

        The last batch of an epoch is filled up, as loaders with `drop_last=False` under accelerate do:
        ⌈passes · count / global_batch⌉ steps per epoch.
        """
        if self.epochs is None:
            return self
        steps = self.epochs * math.ceil(self.passes * count / self.global_batch)
        return replace(self, max_steps=steps if self.max_steps is None else min(steps, self.max_steps))

    def split_batch(self, processes: int) -> tuple[int, int]:
        """(micro-batch, accumulation) such that processes × micro-batch × accumulation = global batch."""
        share, rest = divmod(self.global_batch, processes)
        if rest or share == 0:
            why = f"not divisible by {processes} processes; choose a multiple of {processes}"
            raise UserError(f"trainer.global_batch={self.global_batch}: {why}")
        micro = min(self.micro_batch or share, share)
        if share % micro:
            why = f"does not divide the {share} samples per process; choose a divisor of {share}"
            raise UserError(f"trainer.micro_batch={micro}: {why}")
        return micro, share // micro


def run_settings(cfg: DictConfig) -> dict[str, Any]:
    """What `train` takes from the settings that every training command has."""
    keys = ("output", "seed", "resume", "overwrite", "tracker")
    return {"config": OmegaConf.to_container(cfg, resolve=True)} | {key: cfg[key] for key in keys}
