"""The processes of `accelerate launch`, in training and without, and the tensors that FSDP2 shards.

In a sharded run each process keeps 1/N of every trained tensor, and of its gradient, average and optimizer
state (`StageModel.shard`). `full_tensor` puts a tensor together for a file and `shard_like` takes a process's
part of one, so checkpoints do not depend on the launch.
"""

import atexit
import os
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import parse_flag_from_env, patch_environment
from torch import Tensor

from defi.errors import UserError

Task = TypeVar("Task")

LONGEST = timedelta(days=7)  # that one process may wait for the others, without training
LONGEST_WAIT = timedelta(hours=2)  # of the others while the main one previews, rolls out or saves
FSDP = "ACCELERATE_USE_FSDP"  # set by `accelerate launch`, as these:
SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",  # the presets have a setting of their own
}


# ---------------------------------------------------------------- without training


def processes() -> PartialState:
    """This process among them: its number, how many there are, its device. Without a GPU they run on CPUs."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    atexit.register(leave)
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):  # a launcher's default; it would start on GPUs
        return PartialState(cpu=cpu, timeout=LONGEST)


def leave() -> None:
    """Let Gloo's threads finish before Python ends: one that lets go of a tensor later aborts the process
    (pytorch/pytorch#179291; 3 of 280 short runs). Destroying the group would not end its threads."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        time.sleep(0.2)  # without the interpreter's lock, which they wait for


def print_once(line: str) -> None:
    """Print a line once for all processes, unless it is empty; does not make them join each other."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else os.environ.get("RANK", 0)
    if line and int(rank) == 0:
        print(line)


def share(tasks: Sequence[Task]) -> list[Task]:
    """This process's part of tasks that are the same list in all processes.

    Returns when every process has its list: what one of them finishes from here on is not missing from the
    list of another that still looks for what is left.
    """
    state = processes()
    state.wait_for_everyone()
    return list(tasks[state.process_index :: state.num_processes])


# ---------------------------------------------------------------- training


def sharding_requested() -> bool:
    """Whether `accelerate launch` was asked to shard the model; UserError: otherwise than fsdp.yaml does."""
    sharded = int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get(FSDP, "").lower() in ("true", "1")
    for name, value in SUPPORTED.items():
        if (sharded or not name.startswith("FSDP")) and os.environ.get(name, value).lower() != value:
            fix = "launch with --config_file configs/accelerate/fsdp.yaml"
            raise UserError(f"{name}={os.environ[name]}: only {name.lower()}: {value} is supported; {fix}")
    return sharded


def join_training(precision: str, tracker: str | None, output: Path) -> Accelerator:
    """Join the processes that `accelerate launch` started, or be the only one."""
    if sharding_requested() and precision == "fp16":
        raise UserError("trainer.precision=fp16: not for a sharded model; set trainer.precision=bf16")
    # Newer torch has another name for this switch; accelerate's handler knows the old one alone.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    handlers = [ddp, InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
    atexit.register(leave)
    request = os.environ.pop(FSDP, None)  # accelerate would shard in its own way, and on GPUs only
    try:
        return Accelerator(
            mixed_precision=precision, log_with=tracker, project_dir=output, kwargs_handlers=handlers
        )
    except ValueError as error:
        raise UserError(f"trainer.precision={precision}: {error}; set trainer.precision=no") from None
    finally:
        if request is not None:
            os.environ[FSDP] = request


def in_any_process(fact: bool, accelerator: Accelerator) -> bool:
    """Whether it is so in any process; every process must ask."""
    if accelerator.num_processes == 1:  # a GPU need not be waited for
        return fact
    return bool(accelerator.reduce(torch.tensor(float(fact), device=accelerator.device), "sum") > 0)


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
