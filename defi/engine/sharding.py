"""A model sharded over the processes by PyTorch's FSDP2: each keeps 1/N of every trained tensor.

Gradients, averages and optimizer states are sharded with the weights. Where such a tensor meets a file,
`full_tensor` puts it together and `shard_like` takes a process's part, so that checkpoints do not depend on
how a run was launched.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from defi.errors import UserError

FSDP = "ACCELERATE_USE_FSDP"  # set by `accelerate launch`, as the rest of this block
UNSUPPORTED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
REQUIRED = {
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",  # the presets have a setting of their own
}


def requested() -> bool:
    """Whether `accelerate launch` was told to shard the model.

    Raises:
        UserError: in another way than `configs/accelerate/fsdp.yaml` does.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    fix = "launch with --config_file configs/accelerate/fsdp.yaml"
    for switch in UNSUPPORTED:
        if _is_on(switch):
            raise UserError(f"{switch}=true: not supported; {fix}")
    for name, value in REQUIRED.items() if _is_on(FSDP) else ():
        if os.environ.get(name, value).lower() != value:
            raise UserError(f"{name}={os.environ[name]}: only {name.lower()}: {value} is supported; {fix}")
    return _is_on(FSDP)


def _is_on(switch: str) -> bool:
    return os.environ.get(switch, "false").lower() in ("true", "1")


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Hide the request to shard from accelerate, which would do it in its own way, and on GPUs only."""
    value = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[FSDP] = value


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], frozen: set[nn.Parameter], device: torch.device
) -> None:
    """Shard the model, in place, over all processes; `frozen` parameters stay complete in each of them.

    While the model computes, each of its `blocks` is put together and released again; what is in no block
    stays together for a forward and backward pass. Weights travel in float32 and autocast does the rest: the
    numbers are those of an unsharded model in any precision.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take a second to import
    from torch.distributed.fsdp import fully_shard

    # Stable Video Diffusion's blocks return views; nothing after them works in place.
    warnings.filterwarnings("ignore", message=r".*returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=frozen)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, which takes seconds to import


def full_tensor(tensor: Tensor) -> Tensor:
    """The complete tensor. Of a sharded one, all processes must ask together and in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """The part of `value`, complete in every process, that corresponds to this process's part of `target`."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
