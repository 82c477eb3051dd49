"""Checkpoints written in the background: training waits only while its state is copied to main memory."""

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defi.engine import checkpoint, state
from defi.engine.ema import EMA
from defi.engine.model import StageModel
from defi.errors import UserError
from defi.files import one_line


class Snapshot:
    """A copy of what training changes: weights, buffers, averages, optimizer. Frozen networks are shared.

    The copy is a model of its own in main memory, so that it can be saved as the model itself. Its memory is
    taken once and filled anew by each `take`.
    """

    def __init__(self, model: StageModel, ema: EMA | None) -> None:
        self._originals = model.moving()
        shared = {id(module): module for module in map(model.get_submodule, model.frozen)}
        copies = {id(t): _twin(t) for t in self._originals.values()}
        self.model = copy.deepcopy(model, {**shared, **copies})
        self._copies = self.model.moving()
        self._original_ema, self.ema = ema, EMA(self.model, ema.decay) if ema is not None else None
        self.optimizer: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, optimizer: Mapping[str, Tensor]) -> None:
        """Copy the present state into this one."""
        pairs = [(self._copies[name], tensor) for name, tensor in self._originals.items()]
        if self._original_ema is not None and self.ema is not None:
            pairs += zip(self.ema.average, self._original_ema.average)
        for name, tensor in optimizer.items():
            if name not in self.optimizer:
                self.optimizer[name] = _twin(tensor)
            pairs.append((self.optimizer[name], tensor))
        for copied, tensor in pairs:
            copied.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _twin(tensor: Tensor) -> Tensor:
    """A tensor like this one, in main memory; page-locked if it comes from a GPU, which copies faster."""
    twin = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)
    return torch.nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else twin


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one at a time, and deletes those no longer kept.

    An error of the thread is raised by the next call of any method. Only for the main process.
    """

    def __init__(
        self,
        model: StageModel,
        ema: EMA | None,
        run: Path,
        *,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        keep: int,
        best_metric: str | None,
    ) -> None:
        self._model, self._ema, self._run = model, ema, run
        self._config, self._data = config, data
        self._keep, self._best_metric = keep, best_metric
        self._snapshot: Snapshot | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        *,
        step: int,
        metrics: Mapping[str, float],
        optimizer: Mapping[str, Tensor],
        progress: state.Progress,
        rng: list[dict[str, Any]],
    ) -> None:
        """Copy the state of this step and return while it is written; the write before it is waited for."""
        self.wait()
        if self._snapshot is None:
            self._snapshot = Snapshot(self._model, self._ema)
        snapshot = self._snapshot
        snapshot.take(optimizer)
        metrics, progress = dict(metrics), copy.deepcopy(progress)

        def write_state(folder: Path) -> None:
            state.save_optimizer(folder, snapshot.optimizer)
            state.save_progress(folder, progress, rng)

        self._pending = self._thread.submit(self._write, snapshot, step, metrics, write_state)

    def _write(
        self, snapshot: Snapshot, step: int, metrics: dict[str, float], write_state: Callable[[Path], None]
    ) -> None:
        checkpoint.save(
            snapshot.model, self._run, step=step, config=self._config, data=self._data, metrics=metrics,
            ema=snapshot.ema, state=write_state,
        )  # fmt: skip
        try:
            checkpoint.rotate(self._run, self._keep, self._best_metric)
        except OSError as error:
            raise UserError(
                f"{self._run}/checkpoints: old checkpoints cannot be deleted ({one_line(error)}); "
                "mend the disk, then continue with resume=true"
            ) from None

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._pending is None or self._pending.done()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        if self.idle:
            self.wait()

    def wait(self) -> None:
        """Return when everything is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and let the thread end."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
