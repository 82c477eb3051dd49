"""Checkpoints: folders that are complete or absent, written in the background, with no pickle in them.

<run>/checkpoints/step_00000500/
    (what the model's save_pretrained writes)    weights and config, loadable on their own
    ema/                                         the same with averaged weights, where EMA is on
    config.yaml                                  the resolved configuration of the run
    manifest.json                                stage, step, versions, data, metrics, size of every file
    state/optimizer.safetensors                  the optimizer's tensors, as <kind>.<parameter name>
    state/progress.json, state/rng.json          `Progress`, and the random generators of every process
"""

import copy
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

import defi
from defi.engine.config import TrainerConfig
from defi.engine.distributed import full_tensor
from defi.engine.ema import EMA
from defi.engine.model import StageModel
from defi.engine.optimizer import optimizer_tensors
from defi.engine.output import sync
from defi.engine.resume import OPTIMIZER, Progress, ResumeState
from defi.engine.weights import COPY_AGAIN, load_strict, read_tensors
from defi.errors import UserError, one_line
from defi.files import read_json, read_yaml

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
    found = [path] if is_complete(path) else list_checkpoints(path)
    if not found:
        what = "damaged or half-copied checkpoint" if (path / MANIFEST).exists() else "no checkpoint here"
        kind = f"{stage} run" if stage else "training run"
        raise UserError(f"{path}: {what}; give the output folder of a {kind}, or a checkpoint inside it")
    if stage is not None:
        read_manifest(found[-1], stage)
    return found[-1]


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
    """Whether a run with this `resume` continues from a checkpoint in its folder, instead of starting anew.

    A run that was killed before its first checkpoint left only a configuration: resumed, it starts anew, so
    that a cluster can repeat one command whatever happened.

    Raises:
        UserError: there is no run to resume.
    """
    run = Path(run)
    if not resume or list_checkpoints(run):
        return resume
    if (run / RUN_CONFIG).is_file() and not any((run / "checkpoints").glob("step_*")):
        return False
    raise UserError(f"{run}: resume=true, but it holds no complete checkpoint; leave resume out to start")


def how_to_continue(run: Path) -> str:
    """What to do after a run has failed, as the end of a message."""
    saved = list_checkpoints(run)
    return f"then continue from {saved[-1].name} with resume=true" if saved else "then start again"


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


def restore(
    source: Path,
    progress: Progress,
    model: StageModel,
    ema: EMA | None,
    optimizer: Optimizer,
    scaler: GradScaler | None,
) -> None:
    """Put weights, averages, optimizer and loss scale where the checkpoint `source` left them."""
    averages = source / "ema" if (source / "ema").is_dir() else source
    if ema is not None:
        model.load_weights(averages)
        ema.restart(progress.ema_updates if averages != source else 0)
    model.load_weights(source)
    file = source / "state" / OPTIMIZER
    load_strict(optimizer_tensors(optimizer, model), read_tensors(file), source=file)
    if scaler is not None and progress.scaler is not None:
        scaler.load_state_dict(progress.scaler)


# ---------------------------------------------------------------- writing


def save(
    model: StageModel,
    run: Path,
    *,
    step: int,
    config: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    ema: EMA | None = None,
    state: ResumeState | None = None,
) -> Path:
    """Write `<run>/checkpoints/step_<step>`: into a hidden folder, flushed to the disk, then renamed.

    Args:
        model: its `save_pretrained` writes the weights.
        run: output folder of the run.
        config: resolved configuration; its `preset_name` goes into the manifest.
        data: size and fingerprint of the training data.
        metrics: of the latest evaluation.
        ema: averages of this model's weights, written beside.
        state: what an exact resume needs; None leaves weights only.

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
            state.write(folder / "state")
        (folder / RUN_CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        manifest = environment() | {
            "stage": model.stage,
            "preset": config.get("preset_name"),
            "step": step,
            "data": dict(data or {}),
            "metrics": dict(metrics or {}),
            "files": {str(file.relative_to(folder)): file.stat().st_size for file in files},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in files:  # as the user's umask says; safetensors keep others out
            file.chmod((folder / MANIFEST).stat().st_mode)
        for path in (*sorted(folder.rglob("*"), reverse=True), folder):
            sync(path)
        if final.exists():
            remove(final)
        os.replace(folder, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{final}: cannot be written ({one_line(error)}); free space or repair the disk, "
            "then continue with resume=true"
        ) from None
    return final


def training_tensors(
    model: StageModel, ema: EMA | None, optimizer: Optimizer | None = None
) -> dict[str, Tensor]:
    """What training changes: weights, buffers, averages and, with an optimizer, its tensors."""
    tensors = {f"model {name}": tensor for name, tensor in model.moving().items()}
    if ema is not None:
        tensors |= {f"average {i}": tensor for i, tensor in enumerate(ema.average)}
    if optimizer is not None:
        named = optimizer_tensors(optimizer, model)
        tensors |= {f"optimizer {name}": tensor for name, tensor in named.items()}
    return tensors


class CheckpointWriter:
    """Copies the state of training to main memory and writes it in a thread; training waits for the copy.

    The copy is a model of its own, made before the model is sharded: it can be saved like the model itself,
    and one process can use all of it. Frozen networks are shared. Its memory is taken once.

    Every process has a writer and calls it when the others do, because they put sharded tensors together;
    only the main one keeps copies and writes. An error of the thread is raised by the next call.
    """

    def __init__(
        self,
        model: StageModel,
        trainer: TrainerConfig,
        run: Path,
        *,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        main: bool = True,
    ) -> None:
        self.main, self._trainer = main, trainer
        self._run, self._config, self._data = run, config, data
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if main:
            shared = {id(module): module for module in map(model.get_submodule, model.frozen)}
            copies = {id(tensor): _copy_of(tensor) for tensor in model.moving().values()}
            self.model = copy.deepcopy(model, {**shared, **copies})
            self.ema = EMA(self.model, trainer.ema) if trainer.ema is not None else None
            self._copies = training_tensors(self.model, self.ema)

    def save(
        self,
        tensors: Mapping[str, Tensor],
        progress: Progress,
        rng: list[dict[str, Any]],
        metrics: Mapping[str, float],
    ) -> None:
        """Copy these `training_tensors` and return while they are written; waits for the write before."""
        self.copy(tensors)
        if self.main:
            prefix = "optimizer "
            named = {n.removeprefix(prefix): t for n, t in self._copies.items() if n.startswith(prefix)}
            state = ResumeState(copy.deepcopy(progress), named, rng)
            self._pending = self._thread.submit(self._write, state, dict(metrics))

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy these `training_tensors`, once nothing is being written any more."""
        self.wait()
        for name, tensor in tensors.items():
            complete = full_tensor(tensor)
            if self.main:
                if name not in self._copies:
                    self._copies[name] = _copy_of(complete)
                self._copies[name].copy_(complete, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _write(self, state: ResumeState, metrics: dict[str, float]) -> None:
        save(
            self.model, self._run, step=state.progress.step, config=self._config, data=self._data,
            metrics=metrics, ema=self.ema, state=state,
        )  # fmt: skip
        try:
            rotate(self._run, self._trainer.keep, self._trainer.best_metric)
        except OSError as error:
            raise UserError(
                f"{self._run}/checkpoints: old checkpoints cannot be deleted ({one_line(error)}); "
                "repair the disk, then continue with resume=true"
            ) from None

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._pending is None or self._pending.done()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        if self.idle:
            self.wait()

    def wait(self) -> None:
        """Return when everything is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and let the thread end."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _copy_of(tensor: Tensor) -> Tensor:
    """Memory for a copy: page-locked if the tensor is on a GPU, which copies faster."""
    memory = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)
    return nn.Parameter(memory, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory


def rotate(run: Path, keep: int, best_metric: str | None = None) -> None:
    """Delete all but the newest `keep` complete checkpoints and the one with the largest `best_metric`."""
    checkpoints = list_checkpoints(run)
    kept = set(checkpoints[-keep:])
    if scores := _scores(checkpoints, best_metric):
        kept.add(max(scores, key=scores.__getitem__))  # the oldest of equals: the one evaluated
    for folder in checkpoints:
        if folder not in kept:
            remove(folder)


def best_score(run: Path, metric: str | None) -> float:
    """The largest value of a metric among a run's checkpoints; −∞ where none has it."""
    return max(_scores(list_checkpoints(run), metric).values(), default=-math.inf)


def _scores(checkpoints: Sequence[Path], metric: str | None) -> dict[Path, float]:
    found = {folder: read_manifest(folder)["metrics"].get(metric) for folder in checkpoints}
    return {folder: score for folder, score in found.items() if isinstance(score, (int, float))}


def remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half-deleted one is none; the next save tidies up."""
    hidden = folder.with_name(f".removing_{folder.name}")
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


@functools.cache
def environment() -> dict[str, Any]:
    """Where the weights come from: code version, packages, machine; as they were when first asked."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "version": defi.__version__,
        "git_commit": _git_commit(),
        "packages": {"python": platform.python_version(), **versions},
        "hardware": {"device": device, "system": platform.system()},
    }


def _git_commit() -> str | None:
    """Commit of the checkout this code runs from, and whether files differ from it; None where installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    describe = ("describe", "--always", "--exclude=*", "--abbrev=40", f"--dirty={CHANGED}")
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *describe], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
