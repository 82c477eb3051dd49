"""What an exact resume needs besides weights and averages: progress, optimizer, random generators."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from defi.config import typed
from defi.engine.log import SpikeDetector
from defi.engine.weights import COPY_AGAIN
from defi.errors import UserError
from defi.files import read_json

OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
RNG = "rng.json"


@dataclass
class Progress:
    """Where a run is. The run changes it as it goes; a checkpoint holds it as it was then.

    samples: position in the stream of samples. elapsed_s: seconds of training over all starts.
    left_out: steps whose numbers were not finite. scaler: state of the loss scale, with fp16.
    """

    step: int = 0
    samples: int = 0
    elapsed_s: float = 0.0
    ema_updates: int = 0
    left_out: int = 0
    spikes: SpikeDetector = field(default_factory=SpikeDetector)
    scaler: dict[str, Any] | None = None


@dataclass
class ResumeState:
    """Progress, tensors of the optimizer (`optimizer_tensors`), and `rng_state` of every process."""

    progress: Progress
    optimizer: Mapping[str, Tensor]
    rng: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write all of it into a folder, which is created."""
        folder.mkdir()
        save_file({name: t.contiguous() for name, t in self.optimizer.items()}, folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(asdict(self.progress), indent=1))
        (folder / RNG).write_text(json.dumps(self.rng))


def read_progress(folder: Path) -> tuple[Progress, list[dict[str, Any]]]:
    """Progress and random generators that `ResumeState.write` wrote.

    Raises:
        UserError: the folder holds none, or they are damaged.
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


# ---------------------------------------------------------------- torch's random generators


def rng_state() -> dict[str, str | None]:
    """States of the CPU's and the current GPU's generator, as hexadecimal text."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        name: None if state is None else state.numpy().tobytes().hex()
        for name, state in (("torch", torch.get_rng_state()), ("cuda", cuda))
    }


def set_rng_state(state: Mapping[str, str | None]) -> None:
    """Put the generators where `rng_state` found them."""
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What is drawn inside this context does not change what is drawn after it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def _is_rng_state(state: Any) -> bool:
    """Whether `set_rng_state` takes it; tried on a generator that nobody uses."""
    try:
        torch.Generator().set_state(_tensor(state["torch"]))
        return state["cuda"] is None or len(_tensor(state["cuda"])) > 0
    except (ValueError, TypeError, LookupError, RuntimeError):
        return False


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
