"""Weights and settings in files: read strictly, every name and shape compared with the model's."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from defi.errors import UserError, reading
from defi.processes import shard_like

COPY_AGAIN = "copy the checkpoint again"
BLOCK, BLOCKS = 4096, 64  # bytes, and how many such blocks of a file `fingerprint` reads


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU."""
    with reading(file, COPY_AGAIN):
        return load_file(file)


@torch.no_grad()
def load_strict(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Copy `tensors` into `target` in place; where names or shapes do not agree (`check_fit`), nothing is."""
    check_fit(target, tensors, source=source)
    for name, tensor in target.items():
        tensor.copy_(shard_like(tensors[name], tensor))


def check_fit(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, source: Path | str) -> None:
    """Compare names and shapes of tensors of a file with a model's; UserError with the first misfit."""
    found, wanted = ({name: tuple(t.shape) for name, t in each.items()} for each in (tensors, target))
    wrong = [name for name in wanted if name in found and found[name] != wanted[name]]
    faults = [f"{name} has shape {found[name]}, the model wants {wanted[name]}" for name in wrong]
    faults += [f"lacks {name}" for name in wanted if name not in found]
    faults += [f"has {name}, unknown to the model" for name in found if name not in wanted]
    if faults:
        fix = "use the preset and settings it was trained with"
        raise UserError(f"{source}: {faults[0]} ({len(faults)} such faults); {fix}")


def fingerprint(folder: Path) -> str:
    """Identifies weights by file names, sizes and evenly spread blocks, without reading gigabytes.

    Averaged weights and resume state beside them do not count.
    """
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin")):
        relative, size = file.relative_to(folder), file.stat().st_size
        if relative.parts[0] in ("ema", "state"):
            continue
        digest.update(f"{relative}:{size};".encode())
        with file.open("rb") as stream:
            for i in range(BLOCKS):
                stream.seek(max(0, (size - BLOCK) * i // (BLOCKS - 1)))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]
