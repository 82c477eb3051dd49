"""What an exact resume needs besides weights and averages: progress, optimizer, random generators."""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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
        (folder / RNG).write_text(json.dumps(self.rng, default=_plain))


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
    states = read_json(folder / RNG, COPY_AGAIN, kind=list)
    try:
        rng = [_parsed(state) for state in states]
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError):
        rng = []
    if not rng:
        raise UserError(f"{folder / RNG}: not the states of random generators; {COPY_AGAIN}")
    return progress, rng


# ---------------------------------------------------------------- random generators


def rng_state() -> dict[str, Any]:
    """States of the generators that a model may draw from: Python's, NumPy's, torch's, the current GPU's."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `rng_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What is drawn inside this context does not change what is drawn after it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def _plain(state: Tensor | np.ndarray) -> str | list[int]:
    """As JSON: torch's states are bytes, NumPy's 624 numbers."""
    return state.numpy().tobytes().hex() if torch.is_tensor(state) else state.tolist()


def _parsed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A state of `rng_state` from its JSON; tried on generators that nobody uses, which may refuse it."""
    version, words, gauss = plain["python"]
    kind, keys, position, *rest = plain["numpy"]
    if not 0 <= position <= len(keys):  # NumPy would read beyond the array
        raise ValueError("a position outside of the keys")
    state = {
        "python": (version, tuple(words), gauss),
        "numpy": (kind, np.array(keys, dtype=np.uint32), position, *rest),
        "torch": _tensor(plain["torch"]),
        "cuda": None if plain["cuda"] is None else _tensor(plain["cuda"]),
    }
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["torch"])
    return state


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
