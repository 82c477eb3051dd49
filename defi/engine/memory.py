"""As many samples at a time as the memory holds, with the global batch as it is."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from defi.engine.model import StageModel
from defi.engine.state import preserved_rng


def fits(model: StageModel, batch: Mapping[str, Any], optimizer: Optimizer, accelerator: Accelerator) -> bool:
    """Whether every process has room for a forward and a backward pass over its micro-batch.

    A trial without effects: in eval mode, in which no layer counts or talks to other processes, so that one
    that runs out of memory leaves no other waiting; then all are asked.
    """
    room, coming = True, []
    try:
        if not optimizer.state_dict()["state"]:  # AdamW keeps two averages once it has moved the weights
            coming = [torch.empty_like(parameter) for _, parameter in model.trainable() for _ in range(2)]
        with preserved_rng():
            model.eval()(batch)["loss"].backward()
    except torch.OutOfMemoryError:
        room = False
    finally:
        coming.clear()
        model.train()
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if accelerator.num_processes == 1:
        return room
    short = torch.tensor(float(not room), device=accelerator.device)
    return bool(accelerator.reduce(short, "sum") == 0)
