"""Checkpoints: folders that are complete or not there, found and read strictly, with no pickle in them.

<run>/checkpoints/step_00000500/
    (what the model's save_pretrained writes)    weights and config, loadable on their own
    ema/                                         the same with averaged weights, where EMA is on
    config.yaml                                  the resolved configuration of the run
    state/                                       what an exact resume needs besides (see state.py)
    manifest.json                                stage, step, versions, data, metrics, size of every file
"""

import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError

import defi
from defi.engine.output import sync
from defi.engine.weights import COPY_AGAIN
from defi.errors import UserError
from defi.files import one_line, read_json, read_yaml

if TYPE_CHECKING:
    from defi.engine.ema import EMA
    from defi.engine.model import StageModel

MANIFEST = "manifest.json"
RUN_CONFIG = "config.yaml"
REQUIRED = {"stage": str, "step": int, "data": dict, "metrics": dict, "files": dict}  # of a manifest
CHANGED = "+changes"  # after the commit of a checkout whose files differ from it
PACKAGES = ("torch", "numpy", "accelerate", "diffusers", "transformers", "safetensors")


# ---------------------------------------------------------------- finding and reading


def find_checkpoint(path: Path | str, stage: str | None = None) -> Path:
    """Folder of the newest complete checkpoint at `path`: a run's output folder or a checkpoint itself.

    Raises:
        UserError: there is none, or (with `stage`) it belongs to another stage.
    """
    path = Path(path)
    found = path if is_complete(path) else next(iter(reversed(list_checkpoints(path))), None)
    if found is None:
        what = "damaged or half-copied checkpoint" if (path / MANIFEST).exists() else "no checkpoint here"
        kind = f"{stage} run" if stage else "training run"
        raise UserError(f"{path}: {what}; give the output folder of a {kind}, or a checkpoint inside it")
    if stage is not None:
        read_manifest(found, stage)
    return found


def find_weights(path: Path | str, stage: str | None = None) -> Path:
    """Folder to give to `from_pretrained`: the averaged weights where the checkpoint has them."""
    folder = find_checkpoint(path, stage)
    return folder / "ema" if (folder / "ema").is_dir() else folder


def read_manifest(path: Path | str, stage: str | None = None) -> dict[str, Any]:
    """The manifest of the checkpoint at `path` (a run or a checkpoint), checked to be of `stage` if given.

    Keys: stage, preset, version, step, data {size, fingerprint}, metrics, packages, git_commit, hardware,
    files {name: size}.
    """
    manifest = read_json(find_checkpoint(path) / MANIFEST, COPY_AGAIN)
    if stage is not None and manifest["stage"] != stage:
        raise UserError(
            f"{path}: holds a {manifest['stage']} checkpoint, not {stage}; give the folder of a {stage} run"
        )
    return manifest


def read_run_config(path: Path | str) -> dict[str, Any]:
    """The resolved configuration that the checkpoint at `path` was trained with."""
    return read_yaml(find_checkpoint(path) / RUN_CONFIG, COPY_AGAIN)


def continues(run: Path | str, resume: bool) -> bool:
    """Whether a run with this `resume` goes on from a checkpoint in its folder, instead of starting anew.

    A run that was killed before its first checkpoint left a configuration and nothing to go on from: resumed,
    it starts anew, so that a cluster can repeat one command whatever happened.

    Raises:
        UserError: there is no run to resume.
    """
    run = Path(run)
    if not resume:
        return False
    if list_checkpoints(run):
        return True
    if (run / RUN_CONFIG).is_file() and not any((run / "checkpoints").glob("step_*")):
        return False
    raise UserError(f"{run}: resume=true, but it holds no complete checkpoint; leave resume out to start")


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [folder for folder in sorted((run / "checkpoints").glob("step_*")) if is_complete(folder)]


def is_complete(folder: Path) -> bool:
    """Whether a folder has a manifest and every file in it has its recorded size."""
    try:
        manifest = read_json(folder / MANIFEST, COPY_AGAIN)
        return all(isinstance(manifest.get(key), kind) for key, kind in REQUIRED.items()) and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------- writing


def save(
    model: "StageModel",
    run: Path,
    *,
    step: int,
    config: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    ema: "EMA | None" = None,
    state: Callable[[Path], None] | None = None,
) -> Path:
    """Write `<run>/checkpoints/step_<step>` as a whole: into a hidden folder, flushed, then renamed.

    Args:
        model: its `save_pretrained` writes the weights.
        run: output folder of the run.
        config: resolved configuration; its `preset_name` goes into the manifest.
        data: size and fingerprint of the training data.
        metrics: of the latest evaluation.
        ema: averaged weights, written beside.
        state: writes the resume state into the folder it is given; None leaves weights only.

    Returns:
        The checkpoint folder.

    Raises:
        UserError: the disk is full or cannot be written to; nothing half-written stays.
    """
    final = run / "checkpoints" / f"step_{step:08d}"
    folder = final.with_name(f".writing_{final.name}")
    try:
        for leftover in final.parent.glob(".*_step_*"):
            shutil.rmtree(leftover)
        folder.mkdir(parents=True)
        model.save_pretrained(folder)
        if ema is not None:
            with ema.applied():
                model.save_pretrained(folder / "ema")
        if state is not None:
            (folder / "state").mkdir()
            state(folder / "state")
        (folder / RUN_CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        manifest = environment() | {
            "stage": model.stage,
            "preset": config.get("preset_name"),
            "step": step,
            "data": dict(data or {}),
            "metrics": dict(metrics or {}),
            "files": {
                str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()
            },
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        mode = (folder / MANIFEST).stat().st_mode  # as the user's umask says; safetensors keep others out
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        sync(folder)
        if final.exists():
            remove(final)
        os.replace(folder, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{final}: cannot be written ({one_line(error)}); make room there or mend the disk, "
            "then continue with resume=true"
        ) from None
    return final


def rotate(run: Path, keep: int, best_metric: str | None = None) -> None:
    """Delete all but the newest `keep` complete checkpoints and the one with the largest `best_metric`."""
    checkpoints = list_checkpoints(run)
    kept = set(checkpoints[-keep:])
    if found := scores(checkpoints, best_metric):
        kept.add(max(found, key=found.__getitem__))  # the oldest of equals: the one evaluated
    for folder in checkpoints:
        if folder not in kept:
            remove(folder)


def scores(checkpoints: Sequence[Path], metric: str | None) -> dict[Path, float]:
    """What their latest evaluation says of a metric, for those that have it."""
    found = {folder: read_manifest(folder)["metrics"].get(metric) for folder in checkpoints}
    return {folder: score for folder, score in found.items() if isinstance(score, (int, float))}


def best_score(run: Path, metric: str | None) -> float:
    """The largest value of a metric among a run's checkpoints; −∞ where none has it."""
    return max(scores(list_checkpoints(run), metric).values(), default=-math.inf)


def remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half-deleted one is none; the next save tidies up."""
    hidden = folder.with_name(f".removing_{folder.name}")
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


@functools.cache
def environment() -> dict[str, Any]:
    """Where the weights come from: code version, packages, machine; as they were when first asked."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "version": defi.__version__,
        "git_commit": _git_commit(),
        "packages": versions,
        "hardware": {"device": device, "system": platform.system()},
    }


def _git_commit() -> str | None:
    """Commit of the checkout this code runs from, and whether files differ from it; None where installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        describe = ("describe", "--always", "--exclude=*", "--abbrev=40", f"--dirty={CHANGED}")
        command = ["git", "-C", str(root), *describe]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
