"""Checkpoints: folders that are complete or absent, written in the background, with no pickle in them.

<run>/checkpoints/step_00000500/
    (what the model's save_pretrained writes)    weights and config, loadable on their own
    ema/                                         the same with averaged weights, where EMA is on
    config.yaml                                  the resolved configuration of the run
    manifest.json                                stage, step, versions, data, metrics, size of every file
    state/                                       what an exact resume needs besides (`TrainingState`)
"""

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import defi
from defi.engine.model import StageModel
from defi.engine.optimizer import EMA
from defi.engine.output import sync
from defi.engine.state import AVERAGES, TrainingState
from defi.engine.weights import COPY_AGAIN
from defi.errors import UserError, writing
from defi.files import read_json, read_yaml

MANIFEST = "manifest.json"
RUN_CONFIG = "config.yaml"
NESTED = "defi"  # where folders of LeRobot and of starVLA hold a policy of ours
ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"stage": str, "step": int, "data": dict, "metrics": dict, "files": dict}  # of a manifest
CHANGED = "+changes"  # after the commit of a checkout whose files differ from it
PACKAGES = ("torch", "numpy", "accelerate", "diffusers", "transformers", "safetensors")


# ---------------------------------------------------------------- finding and reading


def find_checkpoint(path: Path | str, stage: str | None = None) -> Path:
    """Folder of the newest complete checkpoint at `path`: a run's output folder or a checkpoint itself,
    in a folder of LeRobot's or starVLA's as well.

    UserError if there is none, or (with `stage`) it belongs to another stage.
    """
    path = Path(path)
    places = path, path / NESTED
    found = [place for place in places if is_complete(place)][:1] or list_checkpoints(path)
    if not found:
        begun = any((place / MANIFEST).exists() for place in places)
        what = "damaged or half-copied checkpoint" if begun else "no checkpoint here"
        kind = f"{stage} run" if stage else "training run"
        raise UserError(f"{path}: {what}; give the output folder of a {kind}, or a checkpoint inside it")
    if stage is not None:
        read_manifest(found[-1], stage)
    return found[-1]


def find_weights(path: Path | str, stage: str | None = None) -> Path:
    """Folder to give to `from_pretrained`: the averaged weights where the checkpoint has them."""
    folder = find_checkpoint(path, stage)
    return folder / AVERAGES if (folder / AVERAGES).is_dir() else folder


def read_manifest(path: Path | str, stage: str | None = None) -> dict[str, Any]:
    """The manifest of the checkpoint at `path` (a run or a checkpoint), checked to be of `stage` if given.

    Keys: stage, preset, version, step, data {size, fingerprint}, metrics, packages, git_commit, hardware,
    files {name: size}.
    """
    manifest = read_json(find_checkpoint(path) / MANIFEST, COPY_AGAIN)
    if stage not in (None, manifest["stage"]):
        fault = f"holds a {manifest['stage']} checkpoint, not {stage}"
        raise UserError(f"{path}: {fault}; give the folder of a {stage} run")
    return manifest


def read_run_config(path: Path | str) -> dict[str, Any]:
    """The resolved configuration that the checkpoint at `path` was trained with."""
    return read_yaml(find_checkpoint(path) / RUN_CONFIG, COPY_AGAIN)


def continues(run: Path | str, resume: bool) -> bool:
    """Whether a run with this `resume` continues from a checkpoint; UserError if there is no run to resume.

    A run that was killed before its first checkpoint left only a configuration: resumed, it starts again,
    so that a cluster can repeat one command whatever happened.
    """
    run = Path(run)
    if not resume or list_checkpoints(run):
        return resume
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
        typed = all(isinstance(manifest.get(key), kind) for key, kind in REQUIRED.items())
        return typed and all((folder / f).stat().st_size == size for f, size in manifest["files"].items())
    except (OSError, ValueError):
        return False


def scores(run: Path, metric: str | None) -> dict[Path, float]:
    """The value of a metric at those of a run's checkpoints that have it."""
    found = {folder: read_manifest(folder)["metrics"].get(metric) for folder in list_checkpoints(run)}
    return {folder: score for folder, score in found.items() if isinstance(score, (int, float))}


# ---------------------------------------------------------------- writing


def save(
    model: StageModel,
    run: Path,
    *,
    step: int,
    config: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    state: TrainingState | None = None,
) -> Path:
    """Write `<run>/checkpoints/step_<step>`: into a hidden folder, flushed to the disk, then renamed.

    Args:
        config: resolved configuration of the run; its `preset_name` goes into the manifest.
        data: size and fingerprint of the training data.
        state: what an exact resume needs, of this model, and latest metrics; None leaves weights only.
    """
    final = run / "checkpoints" / f"step_{step:08d}"
    folder = final.with_name(f".writing_{final.name}")
    with writing(run, final.name):
        for leftover in final.parent.glob(".*_step_*"):
            shutil.rmtree(leftover)
        try:
            folder.mkdir(parents=True)
            model.save_pretrained(folder)
            if state is not None:
                state.write(folder)
            (folder / RUN_CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))))
            facts = {
                "stage": model.stage,
                "preset": config.get("preset_name"),
                "step": step,
                "data": dict(data or {}),
                "metrics": state.progress.metrics if state is not None else {},
            }
            write_manifest(folder, environment() | facts)
            for path in (*sorted(folder.rglob("*"), reverse=True), folder):
                sync(path)
            if final.exists():
                remove(final)
            os.replace(folder, final)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sync(final.parent)
    return final


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Complete a checkpoint whose other files are written: the facts, and the size of every file."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST]
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": sizes}, indent=1))
    for file in files:  # as the user's umask says; safetensors keep others out
        file.chmod((folder / MANIFEST).stat().st_mode)


def rotate(run: Path, keep: int, best_metric: str | None = None) -> None:
    """Delete all but the newest `keep` complete checkpoints and the one with the largest `best_metric`."""
    found = scores(run, best_metric)
    best = max(found, key=found.__getitem__, default=None)  # the oldest of equals: the one evaluated
    with writing(run, "its checkpoints"):
        for folder in list_checkpoints(run)[:-keep]:
            if folder != best:
                remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half-deleted one is none; the next save tidies up."""
    hidden = folder.with_name(f".removing_{folder.name}")
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


class CheckpointWriter:
    """Copies the state of training to main memory and writes it in a thread; training waits for the copy.

    All processes call it together, because of sharded tensors; only the main one has a copy of the `model`,
    made before it was sharded, and calls `write` with it. An error of the thread is raised by the next call.
    """

    def __init__(
        self, state: TrainingState, model: StageModel | None, write: Callable[[TrainingState], None]
    ) -> None:
        self._state, self._write, self.copy = state, write, None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if model is not None:
            ema = EMA(model, state.ema.decay) if state.ema is not None else None
            optimizer = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                for name, tensor in state.optimizer.items()
            }
            self.copy = TrainingState(model, ema, optimizer)

    def save(self) -> None:
        """Copy the state and return while it is written; waits for the write before."""
        self.wait()
        self._state.copy_to(self.copy)
        if self.copy is not None:
            self.copy.progress, self.copy.rng = deepcopy(self._state.progress), self._state.rng
            self._pending = self._thread.submit(self._write, self.copy)

    @property
    def idle(self) -> bool:
        """Whether nothing is being written; `wait` raises the error of a write that failed."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Return when everything is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


# ---------------------------------------------------------------- where weights come from


@functools.cache
def environment() -> dict[str, Any]:
    """Code version, packages and machine, as they were when first asked.

    `git_commit` is of the checkout this code runs from, and says whether files differ from it; or None.
    """
    git = ("git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "describe", "--always", "--abbrev=40")
    commit = None
    with suppress(OSError, subprocess.SubprocessError):
        describe = (*git, "--exclude=*", f"--dirty={CHANGED}")
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)
        commit = done.stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "version": defi.__version__,
        "git_commit": commit,
        "packages": {"python": platform.python_version(), **versions},
        "hardware": {"device": device, "system": platform.system()},
    }
