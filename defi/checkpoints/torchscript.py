"""Tensors of a TorchScript archive, without loading it as a program.

`torch.jit.load` would run the archive's own code, and `torch.load(weights_only=True)` refuses such archives.
Their parameters lie in a pickle like those of `torch.save`; here it is read by an unpickler that knows
tensors and containers and turns every other class into a bag of attributes.
"""

import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defi.errors import UserError, reading
from defi.files import PlainUnpickler

FIX = "download it again, or get its tensors alone (safetensors)"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
DTYPES += (torch.int8, torch.uint8, torch.bool)
KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# Marks of the type of a list or dictionary; they return their argument.
TYPE_MARKS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")


class _Module:
    """An object of any TorchScript class: its attributes, no behaviour."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _unmarked(value: Any, *_: Any) -> Any:
    return value


KNOWN = {
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_parameter": _unmarked,
    "collections.OrderedDict": OrderedDict,
    **{f"torch.jit._pickle.{name}": _unmarked for name in TYPE_MARKS},
    **{f"torch.{kind}Storage": dtype for kind, dtype in zip(KINDS, DTYPES)},
}


class _Unpickler(PlainUnpickler):
    """Calls nothing but the harmless functions of this module."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, self.contents = archive, {}
        self.root = next(n.split("/")[0] for n in archive.namelist() if n.endswith("/data.pkl"))
        super().__init__(archive.open(self._stored("data.pkl")))

    def _stored(self, name: str) -> zipfile.ZipInfo:
        member = self.archive.getinfo(f"{self.root}/{name}")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, as torch never writes it")
        return member

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        return KNOWN.get(f"{module}.{name}") or super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        if key not in self.contents:  # each is read once, and torch never packs them: no file grows in memory
            self.contents[key] = bytearray(self.archive.read(self._stored(f"data/{key}")))
        content = self.contents[key]
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
    with reading(file, FIX), zipfile.ZipFile(file) as archive:
        tensors = dict(_tensors(_Unpickler(archive).load(), "", set()))
    if not tensors:
        raise UserError(f"{file}: a TorchScript archive without tensors; give another file")
    return tensors


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Of modules in modules; each once, since a crafted file could make them contain each other."""
    if id(module) in seen or not isinstance(module, _Module):
        return
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", seen)
