"""Gradients and moments cut over the processes by DeepSpeed (ZeRO, stage 2); weights and averages stay whole.

DeepSpeed reduces gradients, clips and steps in its own way. The classes here make it look like any other
accelerator and optimizer to the loop and to the checkpoints, which are the same as everywhere. Besides what
DeepSpeed documents, two methods of its optimizer are used: `scaled_global_norm` and `refresh_fp32_params`.
"""

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from defi.engine.config import TrainerConfig
from defi.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # numbers sent at a time; DeepSpeed's own choice takes ten times the memory


def check(trainer: TrainerConfig) -> None:
    """Raise UserError where the package is missing, or something is wanted that it cannot do."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "ACCELERATE_USE_DEEPSPEED=true: the package deepspeed is not installed; pip install deepspeed, "
            "or launch with --config_file configs/accelerate/fsdp.yaml, which needs nothing more"
        )
    if trainer.skip_nonfinite:
        raise UserError(
            f"trainer.skip_nonfinite={trainer.skip_nonfinite}: DeepSpeed cannot leave out a step; set it to "
            "0, or launch with --config_file configs/accelerate/fsdp.yaml"
        )


class ZeroAccelerator(Accelerator):
    """Sends backward passes through DeepSpeed's engine."""

    engine: "DeepSpeedEngine"  # set by `shard`

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """More micro-batches follow. The gradients of each are cut and added to those before."""
        self.engine.set_gradient_accumulation_boundary(False)
        yield
        self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: int = 2) -> Tensor:
        """The norm, infinite where a gradient is not finite. `shard` told the engine what to clip to."""
        return self.engine.optimizer.scaled_global_norm()


@dataclass
class Moment:
    """A tensor of the optimizer of which this process holds a part."""

    parameter: nn.Parameter
    kind: str

    def full_tensor(self) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(self.parameter, self.kind)


class ZeroOptimizer:
    """The engine's AdamW, with the model's own parameters and whole moments."""

    def __init__(self, engine: "DeepSpeedEngine", parameters: list[nn.Parameter]) -> None:
        self.engine, self.parameters = engine, parameters
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": 0.0}]
        # DeepSpeed has moments only after a step: one that moves nothing, and does not count.
        engine.backward(sum(0 * parameter.sum() for parameter in parameters), scale_wrt_gas=False)
        self.step()
        self._count(0)

    def _count(self, steps: float) -> None:
        for state in self.engine.optimizer.state.values():
            state["step"].fill_(steps)

    def step(self) -> None:
        """Clip and move the weights."""
        self.engine.optimizer.refresh_fp32_params()  # weights may have been loaded, or codes restarted
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.engine.step()

    def zero_grad(self) -> None:
        """Was part of the engine's step."""

    def state_dict(self) -> dict[str, Any]:
        """An optimizer's, with `Moment` where others have tensors."""
        step = next(iter(self.engine.optimizer.state.values()))["step"]
        moments = [{kind: Moment(parameter, kind) for kind in MOMENTS} for parameter in self.parameters]
        state = {i: {"step": step.cpu()} | kinds for i, kinds in enumerate(moments)}
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over whole moments."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for i, kinds in saved["state"].items():
            for kind in MOMENTS:
                safe_set_full_optimizer_state(
                    self.parameters[i], kinds[kind].to(self.parameters[i].device), kind
                )
            self._count(float(kinds["step"]))


def shard(
    model: nn.Module, optimizer: Optimizer, accelerator: ZeroAccelerator, *, clip: float | None
) -> tuple["DeepSpeedEngine", ZeroOptimizer]:
    """The model as it is to be called, and its optimizer, in DeepSpeed's hands."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # for its own figures alone
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": clip or 0.0,
        "steps_per_print": None,
    }
    parameters = optimizer.param_groups[0]["params"]
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    engine.set_gradient_accumulation_boundary(True)
    accelerator.engine = engine
    return engine, ZeroOptimizer(engine, parameters)
