"""Tensors out of files that others wrote. Nothing that could run code is unpickled."""

import functools
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defi.checkpoints.torchscript import is_torchscript, read_torchscript
from defi.engine.weights import read_tensors
from defi.errors import UserError
from defi.files import one_line

# Lightning keeps the training's settings beside the weights, with the optimizer's class: harmless to load.
SETTINGS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, functools.partial]
ENTRIES = ("state_dict", "model")  # under which Lightning's files and training scripts keep the tensors


def read_foreign(file: Path | str) -> dict[str, Tensor]:
    """The named tensors in a .safetensors file, a TorchScript archive, or a file of `torch.save`, on the CPU.

    Tensors stay on the disk until they are used, where the format allows it. In a file of `torch.save` they
    are the content itself, or lie under one of `ENTRIES`.

    Raises:
        UserError: the file is missing, damaged, holds no named tensors, or would run code when loaded.
    """
    file = Path(file)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise UserError(f"{file}: {what}; give a checkpoint file (.ckpt, .pt, .safetensors)")
    if file.suffix == ".safetensors":
        return read_tensors(file)
    if is_torchscript(file):
        return read_torchscript(file)
    content = _read_pickled(file)
    if isinstance(content, Mapping):
        content = next((content[name] for name in ENTRIES if isinstance(content.get(name), Mapping)), content)
    return _named_tensors(content, file)


def _read_pickled(file: Path) -> Any:
    """What `torch.save` wrote: tensors, containers and numbers only."""
    try:
        # Old files are no zip archives and cannot be mapped into memory.
        with torch.serialization.safe_globals(SETTINGS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file}: refers to {named[1]}, which could run code when loaded, so it is not read; "
                "get its tensors alone (safetensors, or a state_dict of tensors)"
            ) from None
        raise UserError(f"{file}: damaged or no checkpoint ({one_line(error)}); download it again") from None
    except Exception as error:  # whatever damaged bytes make the library raise
        raise UserError(f"{file}: damaged or no checkpoint ({one_line(error)}); download it again") from None


def _named_tensors(content: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{file}: holds a {type(content).__name__}, not named tensors; give a state_dict")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{file}: {name} is a {type(value).__name__}, not a tensor; give a state_dict of tensors"
            )
    return dict(content)
