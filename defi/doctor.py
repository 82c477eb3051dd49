"""Checks of a machine: `python -m defi.doctor` says what works, and how to mend what does not."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from defi.config import entry, flatten
from defi.engine.checkpoint import CHANGED, COPY_AGAIN, MANIFEST, environment, find_checkpoint, read_manifest
from defi.errors import UserError
from defi.sim.renderers import MESA, SOFTWARE, egl_devices
from defi.sim.scene import SceneConfig

PROJECT = "defi-robot"
LOW_DISK = 20e9  # bytes
STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. verdict: ok; note, where something optional is missing; wrong."""

    what: str
    verdict: str
    detail: str
    mend: str = ""


def check_python() -> Iterator[Finding]:
    """The interpreter, and every required package in a version that fits."""
    version = platform.python_version()
    simulates = sys.version_info[:2] in ((3, 10), (3, 11))
    mend = "" if simulates else "use Python 3.10 or 3.11 to simulate; training works with this one"
    yield Finding("Python", "ok" if simulates else "note", f"{version}, {sys.executable}", mend)
    try:
        needed = [Requirement(text) for text in importlib.metadata.requires(PROJECT) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("project", "wrong", f"{PROJECT} is not installed", "run scripts/setup.sh")
        return
    bad = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            bad.append(f"{requirement.name} {found or 'missing'} (needs {requirement.specifier})")
    detail = "; ".join(bad) or "all requirements are met"
    yield Finding("packages", "wrong" if bad else "ok", detail, "run scripts/setup.sh" if bad else "")


def check_torch() -> Iterator[Finding]:
    """PyTorch and the GPUs it sees."""
    yield Finding("PyTorch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        mend = "preset=tiny runs on the CPU; for the others install a GPU driver (nvidia-smi must work)"
        yield Finding("GPU", "note", f"none that PyTorch can use; it was {built}", mend)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        yield Finding(
            f"GPU {index}", "ok", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {precision}"
        )


def check_simulation() -> Iterator[Finding]:
    """PyBullet, and what can draw its pictures."""
    try:
        from defi.sim.bullet import pybullet
    except UserError as error:
        yield Finding("PyBullet", "note", str(error).split(";")[0], str(error).split("; ")[-1])
        return
    yield Finding(
        "PyBullet", "ok", f"{importlib.metadata.version('pybullet')}, API {pybullet.getAPIVersion()}"
    )
    for number, name in egl_devices().items():
        kind = "mesa" if SOFTWARE.search(name) else "gpu"
        yield Finding(f"EGL device {number}", "ok", f"{name} (sim.renderer={kind})")
    if not egl_devices():
        yield Finding("EGL", "note", "no device can draw", f"CALVIN's assets need one: {MESA}")


def check_machine(output: Path) -> Iterator[Finding]:
    """Processors, memory, and room on the disk of `output`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    yield Finding("machine", "ok", f"{cores} processors, {memory / 2**30:.0f} GiB of memory")
    place = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.0f} GB free at {place}"
    if not os.access(place, os.W_OK):
        yield Finding("disk", "wrong", f"{place} cannot be written to", "choose another output=")
    elif free < LOW_DISK:
        yield Finding("disk", "note", detail, "enough for preset=tiny; larger ones need tens of GB")
    else:
        yield Finding("disk", "ok", detail)


def check_clone(calvin_root: str) -> Iterator[Finding]:
    """A clone of CALVIN: all scenes, every file that they name, the instructions; and what draws it here."""
    for scene in "ABCD":
        config = SceneConfig.from_calvin(calvin_root, scene)
        files = [config.arm.urdf, config.table.urdf, config.plane, *(block.urdf for block in config.blocks)]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise UserError(
                f"{missing[0]}: missing; run `git submodule update --init --recursive` in the clone"
            )
    words = Path(calvin_root) / "calvin_models/conf/annotations/new_playtable_validation.yaml"
    if not words.is_file():
        raise UserError(f"{words}: missing; the clone is incomplete")
    yield Finding("CALVIN", "ok", f"{calvin_root}: scenes A, B, C, D and the instructions are there")
    yield from check_pictures(calvin_root)


def check_pictures(calvin_root: str, scene: str = "D") -> Iterator[Finding]:
    """What draws a rollout on CALVIN's assets, and how far the other renderers' pictures are from that."""
    from defi.sim.compare_renderers import describe_difference, draw_with_each

    (chosen, pictures), *others = draw_with_each(calvin_root, scene).items()
    yield Finding("CALVIN's renderer", "ok", f"a rollout takes {chosen}")
    for renderer, drawn in others:
        mend = "leave sim.renderer as it is: such a number compares with no published one"
        wrong = renderer.backend == "cpu"
        detail = f"{renderer}: other pictures of scene {scene}: {describe_difference(pictures, drawn)}"
        yield Finding(
            f"sim.renderer={renderer.kind}", "note" if wrong else "ok", detail, mend if wrong else ""
        )


def check_checkpoint(path: str) -> Iterator[Finding]:
    """A checkpoint: whole, and made in an environment like this one."""
    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    if missing := [key for key in ("stage", "preset", "step") if key not in manifest]:
        raise UserError(f"{folder / MANIFEST}: lacks {', '.join(missing)}; {COPY_AGAIN}")
    detail = f"{folder}: {manifest['stage']}, preset {manifest['preset']}, step {manifest['step']}"
    yield Finding("checkpoint", "ok", detail)
    here = environment()
    now, then = flatten(here), flatten({key: manifest[key] for key in here if key in manifest})
    for key in sorted(now.keys() | then.keys()):
        old, new, name = then.get(key), now.get(key), key.replace(".", " ", 1)
        if old != new:
            detail = f"the checkpoint was made with {old}, here it is {new}"
            yield Finding(name, "note", detail, meaning(name, old))


def meaning(name: str, old: Any) -> str:
    """What it means that an entry of a manifest's environment was `old` and is something else now.

    The manifest may be a stranger's: what it says is quoted in commands.
    """
    kind, _, part = name.partition(" ")
    if kind in ("version", "git_commit"):
        commit = str(old).removesuffix(CHANGED) if kind == "git_commit" and old else None
        same = f"; git checkout {shlex.quote(commit)} has it" if commit else ""
        return f"other code may compute something else{same}"
    if kind == "hardware":
        return "results differ in rounding; a resumed run goes on, not bit for bit"
    if part == "python":
        return f"random choices may differ; Python {old} has the same"
    wanted = shlex.quote(f"{part}=={old}")
    if part == "numpy":
        return f"random numbers, and so samples, may differ; pip install {wanted} has the same"
    return f"results differ in rounding, or more; pip install {wanted} has the same"


def examine(what: str, check: Callable[..., Iterator[Finding]], *args: object) -> Iterator[Finding]:
    """The findings of a check; an error that it raises is one of them."""
    try:
        yield from check(*args)
    except UserError as error:
        detail, _, mend = str(error).partition("; ")
        yield Finding(what, "wrong", detail, mend)


def findings(cfg: DictConfig) -> list[Finding]:
    """All that is found."""
    found = [
        *examine("Python", check_python),
        *examine("PyTorch", check_torch),
        *examine("simulation", check_simulation),
        *examine("machine", check_machine, Path(cfg.output)),
    ]
    if cfg.calvin_root:
        found += examine("CALVIN", check_clone, cfg.calvin_root)
    if cfg.checkpoint:
        found += examine("checkpoint", check_checkpoint, cfg.checkpoint)
    return found


def report(found: Sequence[Finding]) -> Table:
    """What is found, for the terminal; brackets in it are no markup, for it may be a stranger's."""
    table = Table(box=None, pad_edge=False)
    for column in ("what", "", "found", "how to mend it"):
        table.add_column(column, overflow="fold")
    for finding in found:
        verdict = Text(finding.verdict, STYLES[finding.verdict])
        table.add_row(Text(finding.what), verdict, Text(finding.detail), Text(finding.mend))
    return table


@entry("doctor")
def main(cfg: DictConfig) -> None:
    found = findings(cfg)
    Console(highlight=False).print(report(found))
    if any(finding.verdict == "wrong" for finding in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
