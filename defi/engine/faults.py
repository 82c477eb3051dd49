"""What ends a run early: signals, numbers that are not finite, lack of memory, lost workers and processes."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn

from defi.engine.checkpoint import list_checkpoints
from defi.engine.config import TrainerConfig
from defi.engine.data import Batch
from defi.engine.model import StageModel
from defi.engine.output import write_file
from defi.engine.state import preserved_rng
from defi.errors import UserError, one_line
from defi.processes import in_any_process

EXIT_PREEMPTED = 75  # "temporary failure, try again": start the same command with resume=true
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# As the loader says it, or `Feed`; an error within a worker comes as what it is, and says "Caught …" first.
DEAD_WORKER = re.compile(r"DataLoader worker( \(pid|:)")


class Preemption:
    """Remembers that one of `SIGNALS` was received; a second one has its usual effect."""

    def __init__(self) -> None:
        self.received, self._previous = False, {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.close()
        if os.environ.get("RANK", "0") == "0":  # one of the processes
            now = "saving after this step, then exiting. Send again to exit immediately."
            print(f"{signal.Signals(number).name} received: {now}", file=sys.stderr)

    def close(self) -> None:
        """Give the signals back to their previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Stopped(RuntimeError):
    """The run cannot continue as it is set up; `explained` adds from which checkpoint it may."""


@contextmanager
def explained(output: Path, trainer: TrainerConfig) -> Iterator[None]:
    """A fault of memory, disk, loader workers or other processes becomes a UserError, which says from which
    checkpoint to continue; other errors are bugs and stay."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = one_line(error)
        if isinstance(error, Stopped):
            fault = str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            fault = f"{output}: out of memory; choose a smaller preset or a larger GPU"
        elif isinstance(error, OSError):
            fault = f"{error.filename or output}: {error.strerror or reason}; fix that"
        elif isinstance(error, dist.DistError) or "by peer" in str(error):  # the latter is gloo's
            fault = f"{output}: lost another process of this run ({reason}); its own message says why"
        elif DEAD_WORKER.match(str(error)):
            died = f"a loader worker died ({reason}), often from lack of memory"
            fault = f"trainer.workers={trainer.workers}: {died}; lower trainer.workers"
        else:
            raise
        saved = list_checkpoints(output)
        then = f"continue from {saved[-1].name} with resume=true" if saved else "start again"
        raise UserError(f"{fault}, then {then}") from error


def micro_batch_fits(model: StageModel, batch: Mapping[str, Any], accelerator: Accelerator) -> bool:
    """Whether every process has memory for a forward and backward pass over its micro-batch.

    A trial without effects: in eval mode, in which no layer counts or talks to other processes, so that one
    that runs out of memory leaves no other waiting; then all are asked.
    """
    fits = True
    try:
        with preserved_rng():
            model.eval()(batch)["loss"].backward()
    except torch.OutOfMemoryError:
        fits = False
    finally:
        model.train()
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return not in_any_process(not fits, accelerator)


def write_report(file: Path, model: StageModel, batches: Sequence[Batch], facts: Mapping[str, Any]) -> str:
    """Write a process's share of a step that is not finite: its texts, the `origin` and other facts as JSON.

    The tensors of the i-th micro-batch are named `<i>.<name>` in a `.safetensors` file beside it. Returns the
    origin (`find_origin`) and where the report is, or why it could not be written.
    """
    origin = find_origin(model, batches)
    texts = [{name: value for name, value in b.items() if not torch.is_tensor(value)} for b in batches]
    values = [(f"{i}.{name}", value) for i, b in enumerate(batches) for name, value in b.items()]
    tensors = {name: value.cpu().contiguous() for name, value in values if torch.is_tensor(value)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file.with_suffix(".safetensors"), save(tensors))
        write_file(file, json.dumps({**facts, "origin": origin, "batches": texts}, indent=1))
    except OSError as error:
        return f"{origin}; its batch could not be written ({error.strerror})"
    return f"{origin}; its batch is in {file}"


def find_origin(model: StageModel, batches: Sequence[Batch]) -> str:
    """What is the first not to be finite: input, weights, a module's output, or a gradient.

    Runs forward and backward passes over the batches again; gradients are dropped, random generators kept.
    Always runs all of it: of a sharded model the other processes, whose share may be sound, wait for it.
    """
    found: list[str] = []

    def check(what: str, value: Any) -> None:
        if not all(tensor.isfinite().all() for tensor in _tensors(value)):
            found.append(what)

    def watch(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        check(f"the output of {name}", output)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(check, f"the gradient that {name} receives"))

    for name, value in (item for batch in batches for item in batch.items()):
        check(f"{name!r} of the batch", value)
    for name, weights in model.named_parameters():
        check(f"the weights {name}", weights)
    hooks = [m.register_forward_hook(partial(watch, name or "the loss")) for name, m in model.named_modules()]
    try:
        with preserved_rng():
            for batch in batches:
                model(batch)["loss"].backward()
        for name, weights in model.trainable():
            check(f"the gradient of {name}", weights.grad)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return (found or ["nothing when the batch was run again, so the random numbers of the step"])[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of numbers that can be infinite in what a module takes or returns."""
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
        return
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = vars(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        yield from _tensors(part)
