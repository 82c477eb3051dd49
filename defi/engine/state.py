"""What an exact resume needs besides weights: optimizer, random generators, position; no pickle."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.optim import Optimizer

from defi.config import typed
from defi.engine.sharding import shard_like
from defi.engine.spikes import SpikeWatch
from defi.engine.weights import COPY_AGAIN, read_tensors
from defi.errors import UserError
from defi.files import read_json

OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
RNG = "rng.json"


def optimizer_tensors(optimizer: Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as `<kind>.<parameter name>`; its settings are the configuration's."""
    state = optimizer.state_dict()["state"]
    return {f"{kind}.{names[i]}": tensor for i, kinds in state.items() for kind, tensor in kinds.items()}


def save_optimizer(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write what `optimizer_tensors` returned."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER)


def load_optimizer(folder: Path, optimizer: Optimizer, names: list[str]) -> None:
    """Give the optimizer the tensors that `save_optimizer` wrote, those of the parameters `names`.

    Raises:
        UserError: the trained parameters are others than those of the checkpoint.
    """
    parameters = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"])))
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(folder / OPTIMIZER).items():
        kind, name = key.split(".", 1)
        if name not in parameters:
            raise UserError(
                f"{folder / OPTIMIZER}: {name} is not trained by this configuration; resume with the old one"
            )
        if tensor.dim() and tensor.shape != parameters[name].shape:
            raise UserError(
                f"{folder / OPTIMIZER}: {key} has another shape than the model's; resume with the old preset"
            )
        state.setdefault(name, {})[kind] = shard_like(tensor, parameters[name]) if tensor.dim() else tensor
    missing = [name for name in names if name not in state]
    if state and missing:
        raise UserError(
            f"{folder / OPTIMIZER}: lacks {missing[0]}; resume with the configuration of the checkpoint"
        )
    indexed = {i: state[name] for i, name in enumerate(names) if name in state}
    optimizer.load_state_dict({"state": indexed, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_state() -> dict[str, Any]:
    """States of the random generators of this process, as JSON values."""
    version, python, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(python), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def torch_rng_state() -> list[torch.Tensor]:
    """States of torch's generators alone, which are all that a training step draws from: cheap."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_torch_rng_state(states: list[torch.Tensor]) -> None:
    """Put torch's generators where `torch_rng_state` found them."""
    torch.set_rng_state(states[0])
    for cuda in states[1:]:
        torch.cuda.set_rng_state(cuda)


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the random generators of this process where `rng_state` found them."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What is drawn inside this context does not change what is drawn after it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@dataclass
class Progress:
    """Where a run is.

    samples: position in the stream of samples. left_out: steps whose numbers were not finite.
    scaler: state of the loss scale, with fp16.
    """

    step: int = 0
    samples: int = 0
    elapsed_s: float = 0.0
    ema_updates: int = 0
    left_out: int = 0
    spikes: SpikeWatch = field(default_factory=SpikeWatch)
    scaler: dict[str, Any] | None = None


def save_progress(folder: Path, progress: Progress, rng: list[dict[str, Any]]) -> None:
    """Write the position of a run and the random generators of all its processes."""
    (folder / PROGRESS).write_text(json.dumps(asdict(progress), indent=1))
    (folder / RNG).write_text(json.dumps(rng))


def load_progress(folder: Path) -> tuple[Progress, list[dict[str, Any]]]:
    """What `save_progress` wrote.

    Raises:
        UserError: the folder holds none, or it is damaged.
    """
    if not (folder / PROGRESS).is_file():
        raise UserError(f"{folder.parent}: holds weights but no training state; it cannot be resumed")
    progress = typed(Progress, read_json(folder / PROGRESS, COPY_AGAIN), str(folder / PROGRESS))
    if min(progress.step, progress.samples, progress.ema_updates, progress.spikes.steps) < 0:
        raise UserError(f"{folder / PROGRESS}: counts below zero; {COPY_AGAIN}")
    rng = read_json(folder / RNG, COPY_AGAIN, kind=list)
    if not (rng and all(map(_is_rng_state, rng))):
        raise UserError(f"{folder / RNG}: not the states of random generators; {COPY_AGAIN}")
    return progress, rng


def _is_rng_state(state: Any) -> bool:
    """Whether `set_rng_state` takes it; tried on generators that nobody uses."""
    try:
        version, python, gauss = state["python"]
        random.Random().setstate((version, tuple(python), gauss))
        kind, keys, position, *rest = state["numpy"]
        if not 0 <= position <= len(keys):  # NumPy would read beyond the array
            return False
        np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), position, *rest))
        torch.Generator().set_state(_bytes(state["torch"]))
        return state["cuda"] is None or len(_bytes(state["cuda"])) > 0
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError):
        return False


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
