"""Checkpoints written in the background: training waits only while its state is copied to main memory."""

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from defi.engine import checkpoint, state
from defi.engine.ema import EMA
from defi.engine.model import StageModel
from defi.engine.sharding import full_tensor
from defi.errors import UserError
from defi.files import one_line

OPTIMIZER = "optimizer "


def moving_tensors(model: StageModel, ema: EMA | None, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """What training changes, as it is now: weights, buffers, averages; with an optimizer, its tensors."""
    tensors = {f"model {name}": tensor for name, tensor in model.moving().items()}
    if ema is not None:
        tensors |= {f"average {i}": tensor for i, tensor in enumerate(ema.average)}
    if optimizer is not None:
        named = state.optimizer_tensors(optimizer, [name for name, _ in model.trainable()])
        tensors |= {OPTIMIZER + name: tensor for name, tensor in named.items()}
    return tensors


class Snapshot:
    """A copy of what training changes. Frozen networks are shared.

    The copy is a model of its own in main memory, so that it can be saved as the model itself, and whole, so
    that it can be used by one process if the model itself is sharded. It is made before that happens. Its
    memory is taken once and filled anew by each `take`.
    """

    def __init__(self, model: StageModel, decay: float | None) -> None:
        shared = {id(module): module for module in map(model.get_submodule, model.frozen)}
        copies = {id(t): _twin(t) for t in model.moving().values()}
        self.model = copy.deepcopy(model, {**shared, **copies})
        self.ema = EMA(self.model, decay) if decay is not None else None
        self._copies = moving_tensors(self.model, self.ema, None)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy these `moving_tensors` of the original into this one."""
        for name, tensor in tensors.items():
            complete = full_tensor(tensor)
            if name not in self._copies:
                self._copies[name] = _twin(complete)
            self._copies[name].copy_(complete, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """As `state.optimizer_tensors`."""
        return {
            name.removeprefix(OPTIMIZER): tensor
            for name, tensor in self._copies.items()
            if name.startswith(OPTIMIZER)
        }

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The copied model is on a device inside this context, and in main memory again after it."""
        kept = [(tensor, tensor.data) for tensor in self.model.moving().values()]
        for tensor, data in kept:
            tensor.data = data.to(device)
        try:
            yield
        finally:
            for tensor, data in kept:
                tensor.data = data


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
        snapshot: Snapshot,
        run: Path,
        *,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        keep: int,
        best_metric: str | None,
    ) -> None:
        self.snapshot, self._run = snapshot, run
        self._config, self._data = config, data
        self._keep, self._best_metric = keep, best_metric
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        *,
        step: int,
        metrics: Mapping[str, float],
        tensors: Mapping[str, Tensor],
        progress: state.Progress,
        rng: list[dict[str, Any]],
    ) -> None:
        """Copy the `moving_tensors` of this step and return while they are written.

        The write before it is waited for.
        """
        self.copy(tensors)
        snapshot = self.snapshot
        metrics, progress = dict(metrics), copy.deepcopy(progress)

        def write_state(folder: Path) -> None:
            state.save_optimizer(folder, snapshot.optimizer)
            state.save_progress(folder, progress, rng)

        self._pending = self._thread.submit(self._write, snapshot, step, metrics, write_state)

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Put these `moving_tensors` into the snapshot, once nothing is being written any more."""
        self.wait()
        self.snapshot.take(tensors)

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
