"""A model cut over the processes, each of which keeps 1/N of every trained tensor (PyTorch's FSDP2).

With the weights, their gradients, averages and optimizer states are cut. The rest of the engine holds such
tensors as it holds others; where a tensor meets a file or a person, `whole` puts it together and `cut` takes
a process's part of it, so checkpoints do not depend on how a run was launched. DeepSpeed's way of cutting is
in `defi.engine.zero`.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from defi.errors import UserError

if TYPE_CHECKING:
    from defi.engine.model import StageModel

SWITCHES = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
ONLY = {  # of what accelerate's settings can say
    "fsdp": {
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",  # the presets have a setting of their own
    },
    "deepspeed": {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
    },
}


def asked_for() -> str | None:
    """How `accelerate launch` was told to shard the model: "fsdp", "deepspeed"; None for not at all.

    Raises:
        UserError: in another way than the files in `configs/accelerate/` say.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    for how, switch in SWITCHES.items():
        if os.environ.get(switch, "false").lower() not in ("true", "1"):
            continue
        for name, value in ONLY[how].items():
            if os.environ.get(name, value).lower() != value:
                raise UserError(
                    f"{name}={os.environ[name]}: a model is sharded with {name.lower()}: {value} only; "
                    f"launch with --config_file configs/accelerate/{how}.yaml"
                )
        return how
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() in ("true", "1"):
        raise UserError(
            "ACCELERATE_USE_MEGATRON_LM=true: not supported; launch with a file of configs/accelerate/"
        )
    return None


@contextmanager
def left_to_us() -> Iterator[None]:
    """Hide the order to shard from accelerate, which would do it in its own way, and on GPUs alone."""
    orders = {switch: os.environ.pop(switch) for switch in SWITCHES.values() if switch in os.environ}
    try:
        yield
    finally:
        os.environ.update(orders)


def shard(model: "StageModel", *, processes: int, device: torch.device) -> None:
    """Cut the model, in place, over all processes; frozen sub-networks stay whole in each of them.

    While it computes, each of the model's `blocks` is put together and let go again; all that is in no block,
    for as long as a forward and backward pass lasts. Weights travel in float32 and autocast does the rest:
    the numbers are those of a whole model in any precision.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take a second to import
    from torch.distributed.fsdp import fully_shard

    # Stable Video Diffusion's blocks do; nothing after them works in place.
    warnings.filterwarnings("ignore", message=r".*returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (processes,))
    frozen = {p for name in model.frozen for p in model.get_submodule(name).parameters()}
    for module in (*model.unfrozen_blocks(), model):
        fully_shard(module, mesh=mesh, ignored_params=frozen)


def is_cut(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")  # a DTensor, which takes seconds to import, or a `zero.Moment`


def whole(tensor: Tensor) -> Tensor:
    """The tensor, of a cut one put together; then all processes must ask for the same ones in turn."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def hand_over(tensors: Iterable[Tensor]) -> None:
    """Take part while the main process asks for these tensors as a whole."""
    for tensor in tensors:
        whole(tensor)


def cut(value: Tensor, *, like: Tensor) -> Tensor:
    """Of a whole value that every process has, what belongs beside `like`."""
    if not is_cut(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
