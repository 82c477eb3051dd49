"""Tensors out of files that others wrote. Nothing that could run code is unpickled."""

import functools
import pickle
import re
import zipfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defi.checkpoints.torchscript import FIX, is_torchscript, read_torchscript
from defi.engine.weights import read_tensors
from defi.errors import UserError, reading
from defi.files import read_json


class NumPyValue:
    """Stands for a number or array of NumPy's beside the weights: nothing is made of it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


NUMPY = ["numpy.ndarray", "numpy.dtype"]
NUMPY += [f"numpy.{c}.multiarray.{name}" for c in ("core", "_core") for name in ("scalar", "_reconstruct")]
# Lightning keeps the training's settings beside the weights, with the optimizer's class: harmless to load.
SETTINGS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, functools.partial]
SETTINGS += [(NumPyValue, name) for name in NUMPY]
ENTRIES = ("state_dict", "model_state_dict", "model", "module")  # under which scripts keep the tensors
INDEX = "*.index*.json"  # of weights in several files
# What wrappers put before names: of everything (DDP, Lightning, averages), and of each part that they wrap.
AROUND = ("module.", "model.", "_forward_module.")
WITHIN = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def read_foreign(path: Path | str) -> dict[str, Tensor]:
    """The named tensors in a .safetensors file, a TorchScript archive, or a file of `torch.save`, on the CPU.

    Or in several files, by their index (`….index.json`) or its folder. Tensors stay on the disk until they
    are used, where the format allows it. In a file of `torch.save` they are the content itself, or lie under
    one of `ENTRIES`. Names come without what wrappers put before them.

    Raises:
        UserError: a file is missing, damaged, holds no named tensors, or would run code when loaded.
    """
    path = Path(path)
    file = find_index(path) or path
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise UserError(f"{file}: {what}; give a checkpoint file (.ckpt, .pt, .safetensors)")
    return _unwrapped(_read_parts(file) if fnmatch(file.name, INDEX) else _read_file(file))


def read_published(path: Path | str, mark: str, title: str) -> dict[str, Tensor]:
    """As `read_foreign`, of a file that must hold the tensor `mark`: only those called `title` do."""
    tensors = read_foreign(path)
    if mark not in tensors:
        raise UserError(f"{path}: no {title} (no {mark}); give its checkpoint, or another stage=")
    return tensors


def is_archive(file: Path) -> bool:
    """Whether a file of `torch.save` is a zip archive, as all but old ones are.

    Raises:
        ValueError: one with compressed members, which torch never writes: they could fill the memory.
    """
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("its members are compressed, as torch never writes them")
    return True


def find_index(folder: Path) -> Path | None:
    """The index of weights that lie in several files of a folder, if there is one."""
    unsplit = any(folder.glob("[!.]*.safetensors"))  # then an index of .bin files came along without them
    found = [file for file in folder.glob(f"[!.]{INDEX}") if not (unsplit and ".bin." in file.name)]
    return min(found, key=lambda file: (len(file.name), file.name), default=None)


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_tensors(file)
    if is_torchscript(file):
        return read_torchscript(file)
    content = _read_pickled(file)
    for _ in ENTRIES:  # they may lie in each other, but a file may also lie in itself
        if isinstance(content, Mapping):
            content = next((content[e] for e in ENTRIES if isinstance(content.get(e), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{file}: holds a {type(content).__name__}, not named tensors; give a state_dict")
    if other := next((name for name, value in content.items() if not isinstance(value, Tensor)), None):
        kind = type(content[other]).__name__
        raise UserError(f"{file}: {other} is a {kind}, not a tensor; give a state_dict of tensors")
    return dict(content)


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names; each must be there."""
    again = "copy the complete folder again"
    places = read_json(index, again).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: no index of weights (weight_map: {{tensor: file}}); {again}")
    names = sorted(set(places.values()))
    if foreign := [name for name in names if not name or Path(name).name != name]:
        raise UserError(f"{index}: names {foreign[0]!r}, outside the folder; this checkpoint is not safe")
    parts = [index.with_name(name) for name in names]
    if missing := [part for part in parts if not part.is_file()]:
        count = f"{len(missing)} of the {len(parts)} files in {index.name}"
        raise UserError(f"{missing[0]}: missing, {count}; {again}")
    tensors = {name: tensor for part in parts for name, tensor in _read_file(part).items()}
    if lost := [name for name in places if name not in tensors]:
        raise UserError(f"{index}: {lost[0]} is in none of its files ({len(lost)} such); {again}")
    return tensors


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names that the model has in itself."""
    named = {WITHIN.sub("", name): tensor for name, tensor in tensors.items() if name != COUNTER}
    if len(named) + (COUNTER in tensors) < len(tensors):  # two would have one name
        return tensors
    while around := next((a for a in AROUND if named and all(name.startswith(a) for name in named)), None):
        named = {name.removeprefix(around): tensor for name, tensor in named.items()}
    return named


def _read_pickled(file: Path) -> Any:
    """What `torch.save` wrote: tensors, containers and numbers only."""
    with reading(file, FIX):
        try:
            # Old files are no zip archives and cannot be mapped into memory.
            with torch.serialization.safe_globals(SETTINGS):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive(file))
        except pickle.UnpicklingError as error:
            if named := re.search(r"GLOBAL (\S+)", str(error)):
                raise ValueError(f"refers to {named[1]}, which could run code") from None
            if "Unsupported operand" in str(error) and zipfile.is_zipfile(file):
                raise ValueError("damaged, or pickled by another protocol than torch.save's own") from None
            raise
