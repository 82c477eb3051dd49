"""What is in a checkpoint, ours or published: sizes, types, stage, the presets it fits.

python -m defi.checkpoints.inspect path=<run, folder or file>
python -m defi.checkpoints.inspect path=lam_idm.ckpt tensors=true      every tensor
"""

import itertools
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from defi.checkpoints.convert import ADAPTERS, adapter
from defi.checkpoints.files import find_index, read_foreign
from defi.checkpoints.matching import part_of
from defi.config import compose_preset, entry, presets
from defi.engine.checkpoint import MANIFEST, NESTED, find_checkpoint, list_checkpoints, read_manifest
from defi.engine.model import CONFIG
from defi.errors import UserError
from defi.files import find_files, read_json

STATE = {"ema", "state"}  # of our checkpoints: beside the weights themselves


class Found(NamedTuple):
    """A checkpoint. stage: None where it belongs to none. published: the names are not ours.
    policy: the configuration of a policy of ours.
    """

    title: str
    tensors: dict[str, Tensor]
    stage: str | None = None
    published: bool = True
    policy: Any = None


def open_checkpoint(path: Path) -> Found:
    """What lies at `path`.

    Raises:
        UserError: nothing that this project reads.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run, a checkpoint folder or a file")
    ours = any((place / MANIFEST).is_file() for place in (path, path / NESTED))
    if ours or list_checkpoints(path):
        folder = find_checkpoint(path)
        manifest = read_manifest(folder)
        title = f"{manifest['stage']} of this project, preset {manifest['preset']}, step {manifest['step']}"
        found = Found(title, _weights(folder), manifest["stage"], published=False)
        return found._replace(policy=policy_config(folder)) if found.stage == "policy" else found
    if (path / "unet").is_dir():
        video = adapter("gfdm")
        return Found(video.TITLE, video.read(path), "gfdm")
    if (path / "config.json").is_file():
        kind = read_json(path / "config.json", "copy the folder again").get("model_type", "unknown kind")
        return Found(f"Hugging Face folder ({kind})", _weights(path))
    if path.is_file() or find_index(path):
        tensors = read_foreign(path)
        stage = next((stage for stage in ADAPTERS if adapter(stage).MARK in tensors), None)
        return Found(adapter(stage).TITLE if stage else "tensors of an unknown model", tensors, stage)
    raise UserError(f"{path}: no checkpoint here; give a run, a diffusers or Hugging Face folder, or a file")


def policy_config(folder: Path) -> Any:
    """The `PolicyConfig` of a policy's checkpoint; by name, since this package imports no stage."""
    return import_module("Step3_DeFI.config").PolicyConfig.read(folder / CONFIG)


def _weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of all files of weights; those of a subfolder begin with its name."""
    tensors: dict[str, Tensor] = {}
    files = find_files(folder, [".safetensors"]) or find_files(folder, [".bin"])
    # Of those that belong together their index is read, once.
    for file in dict.fromkeys(find_index(file.parent) or file for file in files):
        place = file.relative_to(folder).parts[:-1]
        if not STATE.intersection(place[:1]):
            tensors |= {".".join([*place, name]): tensor for name, tensor in read_foreign(file).items()}
    if not tensors:
        raise UserError(f"{folder}: no files of weights here; copy the folder again")
    return tensors


def fitting(found: Found) -> list[str]:
    """The presets whose trained part has exactly these tensors (a controllable GIDM is named as such)."""
    stage, fits = adapter(found.stage), []
    variants = [[], ["gidm.variant=controllable"]] if found.stage == "gidm" else [[]]
    for preset, settings in itertools.product(presets(), variants):
        with torch.device("meta"), suppress(UserError):  # the preset has parts that the published model lacks
            model = stage.build(compose_preset(preset, *settings))
            wanted = stage.publish(model) if found.published else model.own_state()
            shapes = {name: found.tensors[name].shape for name in wanted if name in found.tensors}
            if shapes == {name: tensor.shape for name, tensor in wanted.items()}:
                fits.append(" ".join([preset, *settings]))
    return fits


def table(tensors: Mapping[str, Tensor], *, each: bool) -> Table:
    """One row per part, or per tensor."""
    rows: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        rows.setdefault(name if each else part_of(name), []).append(tensor)
    view = Table(box=None, pad_edge=False)
    for column in ("tensor" if each else "part", "shape" if each else "tensors", "parameters", "type", "MB"):
        view.add_column(column, justify="left" if column in ("tensor", "part", "type") else "right")
    for name, group in [*rows.items(), ("total", list(tensors.values()))]:
        which = "×".join(map(str, group[0].shape)) if each and name != "total" else f"{len(group):,}"
        kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in group}))
        parameters, size = sum(t.numel() for t in group), sum(t.nbytes for t in group)
        view.add_row(escape(name), which, f"{parameters:,}", kinds, f"{size / 1e6:,.1f}")
    return view


def robot_table(policy: Any) -> Table:
    """Of a `PolicyConfig`."""
    view = Table(box=None, pad_edge=False)
    for column in ("robot", "name", "unit", "normalisation", "range in the data"):
        view.add_column(column)
    for row in policy.robot.rows(state=policy.state):
        view.add_row(*map(escape, row))
    return view


@entry("inspect")
def main(cfg: DictConfig) -> None:
    found = open_checkpoint(Path(cfg.path))
    print(f"{cfg.path}: {found.title}")
    Console(highlight=False).print(table(found.tensors, each=cfg.tensors))
    if found.policy is not None:
        Console(highlight=False).print(robot_table(found.policy))
        print(f"robot        {found.policy.robot.summary(found.policy.chunk)}")
    if found.stage in ("gfdm", "gidm", "policy"):
        print(f"fits preset  {', '.join(fitting(found)) or 'none'}")


if __name__ == "__main__":
    main()
