"""What goes wrong in a run: numbers that are not finite, too little memory, lost workers and processes."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn

from defi.engine.distributed import in_any_process
from defi.engine.model import StageModel
from defi.engine.output import write_file
from defi.engine.resume import preserved_rng
from defi.errors import one_line

# As the loader says it, or `Feed`; an error within a worker comes as what it is, and says "Caught …" first.
DEAD_WORKER = re.compile(r"DataLoader worker( \(pid|:)")


def explain(error: Exception, output: Path, *, micro_batch: int | None, workers: int) -> str | None:
    """One line for a fault of memory, disk, loader workers or other processes; None for any other error.

    `micro_batch` is None before the first step.
    """
    if isinstance(error, torch.OutOfMemoryError):
        if micro_batch is None:
            return f"{output}: out of memory before the first step; choose a smaller preset or a larger GPU"
        return f"trainer.micro_batch={micro_batch}: out of memory; lower it (the global batch stays)"
    if isinstance(error, OSError):
        return f"{error.filename or output}: {error.strerror or one_line(error)}; fix that"
    if not isinstance(error, RuntimeError):
        return None
    if isinstance(error, dist.DistError) or "by peer" in str(error):  # the latter is gloo's
        return f"{output}: lost another process of this run ({one_line(error)}); its own message says why"
    if DEAD_WORKER.match(str(error)):
        died = f"a loader worker died ({one_line(error)}), often from lack of memory"
        return f"trainer.workers={workers}: {died}; lower trainer.workers"
    return None


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


def write_report(
    folder: Path,
    model: StageModel,
    batches: Sequence[Mapping[str, Any]],
    *,
    step: int,
    process: int,
    reason: str,
    samples: Sequence[int],
) -> str:
    """Write a process's share of a step that is not finite, as `step_<step>_process_<n>.{json,safetensors}`.

    The tensors of the i-th micro-batch are named `<i>.<name>`; its texts are in the JSON file, beside the
    reason, the samples' indices in the data set and the `origin`.

    Returns:
        The origin (`find_origin`) and where the report is, or why it could not be written.
    """
    origin = find_origin(model, batches)
    file = folder / f"step_{step:08d}_process_{process}.json"
    tensors: dict[str, Tensor] = {}
    rest: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        named = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        tensors |= {f"{number}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}
        rest.append({name: value for name, value in batch.items() if name not in named})
    report = {"step": step, "reason": reason, "origin": origin, "samples": list(samples), "batches": rest}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(file.with_suffix(".safetensors"), save(tensors))
        write_file(file, json.dumps(report, indent=1))
    except OSError as error:
        return f"{origin}; its batch could not be written ({error.strerror})"
    return f"{origin}; its batch is in {file}"


def find_origin(model: StageModel, batches: Sequence[Mapping[str, Any]]) -> str:
    """What is the first not to be finite: input, weights, a module's output, or a gradient.

    Runs forward and backward passes over the batches again; gradients are dropped, random generators kept.
    Always runs all of it: of a sharded model the other processes, whose share may be sound, wait for it.
    """
    found = [
        f"{name!r} of the batch"
        for batch in batches
        for name, value in batch.items()
        if torch.is_tensor(value) and not _finite(value)
    ]
    found += [f"the weights {name}" for name, tensor in model.named_parameters() if not _finite(tensor)]

    def watch(name: str) -> Any:
        def check_gradient(gradient: Tensor) -> None:
            if not _finite(gradient):
                found.append(f"the gradient that {name} receives")

        def check_output(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    found.append(f"the output of {name}")
                elif tensor.requires_grad:
                    tensor.register_hook(check_gradient)

        return check_output

    hooks = [m.register_forward_hook(watch(name or "the loss")) for name, m in model.named_modules()]
    try:
        with preserved_rng():
            for batch in batches:
                model(batch)["loss"].backward()
        found += [
            f"the gradient of {name}"
            for name, parameter in model.trainable()
            if parameter.grad is not None and not _finite(parameter.grad)
        ]
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return (found or ["nothing when the batch was run again, so the random numbers of the step"])[0]


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what a module returned."""
    if torch.is_tensor(value):
        yield value
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
