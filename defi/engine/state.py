"""The state of training: everything that an exact resume needs, in one place."""

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
from torch import Tensor, nn
from torch.amp import GradScaler

from defi.config import typed
from defi.engine.log import SpikeDetector
from defi.engine.model import StageModel
from defi.engine.optimizer import EMA
from defi.engine.weights import COPY_AGAIN, load_strict, read_tensors
from defi.errors import UserError, reading
from defi.files import read_json
from defi.processes import full_tensor

AVERAGES = "ema"
OPTIMIZER, PROGRESS, RNG = "state/optimizer.safetensors", "state/progress.json", "state/rng.json"


# ---------------------------------------------------------------- global random generators


def rng_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and the current GPU, which a model may draw from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `rng_state` found them; its arrays may be lists, as in a checkpoint."""
    version, words, gauss = state["python"]
    kind, keys, position, *rest = state["numpy"]
    if not 0 <= position <= len(keys):  # NumPy would read beyond the array
        raise ValueError("a position outside of the keys")
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(state: Tensor | list[int] | str) -> Tensor:
    """A state as a tensor, in a checkpoint numbers, in older ones hexadecimal."""
    return torch.as_tensor(list(bytes.fromhex(state)) if isinstance(state, str) else state, dtype=torch.uint8)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What is drawn inside this context does not change what is drawn after it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


# ---------------------------------------------------------------- all of it


@dataclass
class Progress:
    """Where a run is. The run changes it as it goes; a checkpoint holds it as it was then."""

    step: int = 0
    samples: int = 0  # position in the stream of samples
    elapsed_s: float = 0.0  # training, over all starts
    ema_updates: int = 0
    left_out: int = 0  # steps whose numbers were not finite
    spikes: SpikeDetector = field(default_factory=SpikeDetector)
    scaler: dict[str, Any] | None = None  # state of the loss scale, with fp16
    metrics: dict[str, float] = field(default_factory=dict)  # of the latest evaluation


@dataclass
class TrainingState:
    """All that training changes: weights and buffers, averages, the optimizer's tensors, counts, generators.

    Tensors are changed in place, so that these are always the present ones.
    """

    model: StageModel
    ema: EMA | None
    optimizer: dict[str, Tensor]  # <kind>.<parameter name>, see `optimizer_tensors`
    progress: Progress = field(default_factory=Progress)
    rng: list[dict[str, Any]] = field(default_factory=list)  # `rng_state` of every process

    def __post_init__(self) -> None:
        tensors = self.model.mutable_tensors().values()
        self._buffers = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]

    def mark(self) -> None:
        """Remember what a step changes before it moves the weights."""
        self._before = ([buffer.clone() for buffer in self._buffers], rng_state())

    def rewind(self) -> None:
        """Undo a step that has not moved the weights."""
        buffers, rng = self._before
        for buffer, before in zip(self._buffers, buffers):
            buffer.copy_(before)
        set_rng_state(rng)

    def tensors(self, *, optimizer: bool = True) -> list[Tensor]:
        """All tensors, or those of the networks alone, in an order that a copy of the state shares."""
        averages = self.ema.average if self.ema is not None else []
        moments = self.optimizer.values() if optimizer else []
        return [*self.model.mutable_tensors().values(), *averages, *moments]

    def copy_to(self, copy: "TrainingState | None", *, optimizer: bool = True) -> None:
        """Copy the tensors, put together where they are sharded: all processes call this, one has a copy."""
        tensors = self.tensors(optimizer=optimizer)
        targets = copy.tensors(optimizer=optimizer) if copy is not None else [None] * len(tensors)
        with torch.no_grad():
            for tensor, target in zip(tensors, targets, strict=True):
                complete = full_tensor(tensor)
                if target is not None:
                    target.copy_(complete, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, folder: Path) -> None:
        """Write into a checkpoint's folder what `StageModel.save_pretrained` does not."""
        if self.ema is not None:
            with self.ema.applied():
                self.model.save_pretrained(folder / AVERAGES)
        (folder / PROGRESS).parent.mkdir()
        save_file({name: t.contiguous() for name, t in self.optimizer.items()}, folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(asdict(self.progress), indent=1))
        (folder / RNG).write_text(json.dumps(self.rng, default=lambda array: array.tolist()))

    def load(self, folder: Path, scaler: GradScaler | None) -> None:
        """Put tensors and loss scale where the checkpoint left them, as `progress` says (`read_progress`)."""
        if self.ema is not None:
            averaged = (folder / AVERAGES).is_dir()
            with self.ema.applied():
                self.model.load_weights(folder / AVERAGES if averaged else folder)
            self.ema.updates = self.progress.ema_updates if averaged else 0
        self.model.load_weights(folder)
        load_strict(self.optimizer, read_tensors(folder / OPTIMIZER), source=folder / OPTIMIZER)
        if scaler is not None and self.progress.scaler is not None:
            scaler.load_state_dict(self.progress.scaler)


def read_progress(folder: Path) -> tuple[Progress, list[dict[str, Any]]]:
    """Progress, and the generators of all processes, of a checkpoint; UserError if it has none."""
    file = folder / PROGRESS
    if not file.is_file():
        raise UserError(f"{folder}: holds weights but no training state; it cannot be resumed")
    progress = typed(Progress, read_json(file, COPY_AGAIN), str(file))
    if min(progress.step, progress.samples, progress.ema_updates, progress.spikes.steps) < 0:
        raise UserError(f"{file}: counts below zero; {COPY_AGAIN}")
    generators = read_json(folder / RNG, COPY_AGAIN, kind=list)
    with reading(folder / RNG, COPY_AGAIN), preserved_rng():
        for state in generators or [{}]:
            set_rng_state(state)  # tried, because a damaged one fails here
    return progress, generators
