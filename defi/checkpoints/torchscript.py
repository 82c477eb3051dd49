"""Tensors of a TorchScript archive, without loading it as a program.

`torch.jit.load` would run the archive's own code, and `torch.load(weights_only=True)` refuses such archives.
Their parameters lie in a pickle like those of `torch.save`; here it is read by an unpickler that knows
tensors and containers and turns every other class into a bag of attributes.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defi.errors import UserError, one_line

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Marks of the type of a list or dictionary; they return their argument.
TYPE_MARKS = {"build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag"}


class _Module:
    """An object of any TorchScript class: its attributes, no behaviour."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _unmarked(value: Any, *_: Any) -> Any:
    return value


class _Unpickler(pickle.Unpickler):
    """Calls nothing but the three harmless functions of this module."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _rebuild if name == "_rebuild_tensor_v2" else _unmarked
        if module == "torch.jit._pickle" and name in TYPE_MARKS:
            return _unmarked
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip file with code in it."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.split("/")[1:2] == ["constants.pkl"] for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # damaged, or none
        return False


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names.

    Raises:
        UserError: the archive is damaged, or its pickle asks for more than tensors and containers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            root = next(name.split("/")[0] for name in archive.namelist() if name.endswith("/data.pkl"))
            module = _Unpickler(archive, root).load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: refers to {one_line(error)}, which could run code when loaded, so it is not read; "
            "get its tensors alone (safetensors, or a state_dict of tensors)"
        ) from None
    except Exception as error:  # whatever a damaged pickle may lead to
        raise UserError(f"{file}: damaged archive ({one_line(error)}); download it again") from None
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors, set())
    if not tensors:
        raise UserError(f"{file}: a TorchScript archive without tensors; give another file")
    return tensors


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor], seen: set[int]) -> None:
    """Walk modules in modules; each once, since a crafted file could make them contain each other."""
    if id(module) in seen or not isinstance(module, _Module):
        return
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
        else:
            _collect(value, f"{prefix}{name}.", tensors, seen)
