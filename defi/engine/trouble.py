"""Numbers that are not finite: which batch it was, and where in the model it began."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from defi.engine.model import StageModel
from defi.engine.output import write_file
from defi.engine.state import preserved_rng


def write_report(
    folder: Path,
    batches: Sequence[Mapping[str, Any]],
    *,
    step: int,
    process: int,
    reason: str,
    samples: Sequence[int],
    origin: str,
) -> Path:
    """Write a process's share of a step that went wrong, as `step_<step>_process_<n>.{json,safetensors}`.

    The tensors of the i-th micro-batch are named `<i>.<name>`; its texts are in the JSON file, beside the
    reason, the samples' indices in the data set and where the trouble began.

    Returns:
        The JSON file.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    file = folder / f"step_{step:08d}_process_{process}.json"
    tensors: dict[str, Tensor] = {}
    rest: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        named = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        tensors |= {f"{number}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}
        rest.append({name: value for name, value in batch.items() if name not in named})
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file.with_suffix(".safetensors"), save(tensors))
    report = {"step": step, "reason": reason, "origin": origin, "samples": list(samples), "batches": rest}
    write_file(file, json.dumps(report, indent=1))
    return file


def find_origin(model: StageModel, batches: Sequence[Mapping[str, Any]]) -> str:
    """What is the first not to be finite: input, weights, a module's output, or a gradient.

    Runs forward and backward passes over the batches again; gradients are dropped, random generators kept.
    Does all of it in any case: of a sharded model the other processes, whose share may be sound, wait for it.
    """
    found = [
        f"{name!r} of the batch"
        for batch in batches
        for name, value in batch.items()
        if torch.is_tensor(value) and not _finite(value)
    ]
    found += [f"the weights {name}" for name, tensor in model.named_parameters() if not _finite(tensor)]

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    found.append(f"the output of {name}")
                elif tensor.requires_grad:
                    tensor.register_hook(look_back)

        def look_back(gradient: Tensor) -> None:
            if not _finite(gradient):
                found.append(f"the gradient that {name} receives")

        return look

    hooks = [
        module.register_forward_hook(watch(name or "the loss")) for name, module in model.named_modules()
    ]
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
    return (found or ["nothing when the batch was run again; the random numbers of the step are to blame"])[0]


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what a module returned."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
