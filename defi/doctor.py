"""Checks of a machine: `python -m defi.doctor` says what works, and how to fix what does not."""

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
from rich.table import Column, Table
from rich.text import Text

from defi.benchmarks.simpler.check import check_assets, check_packages, drawing
from defi.benchmarks.simpler.episodes import TASKS
from defi.config import entry, flatten
from defi.engine.checkpoint import CHANGED, COPY_AGAIN, MANIFEST, environment, find_checkpoint, read_manifest
from defi.errors import UserError
from defi.sim.renderers import MESA, SOFTWARE, describe_difference, draw_with_each, egl_devices
from defi.sim.scene import SceneConfig

PROJECT = "defi-robot"
LOW_DISK = 20e9  # bytes
STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}
WORDS = "calvin_models/conf/annotations/new_playtable_validation.yaml"


@dataclass(frozen=True)
class Finding:
    """One line of the report; a `fix` makes it a note, `wrong` an error."""

    what: str
    detail: str
    fix: str = ""
    wrong: bool = False

    @property
    def verdict(self) -> str:
        return "wrong" if self.wrong else "note" if self.fix else "ok"


def check_python() -> Iterator[Finding]:
    """The interpreter, and every required package in a version that fits."""
    simulates = sys.version_info[:2] in ((3, 10), (3, 11))
    fix = "" if simulates else "use Python 3.10 or 3.11 to simulate; training works with this one"
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}", fix)
    if not _version(PROJECT):
        raise UserError(f"{PROJECT} is not installed; run scripts/setup.sh")
    bad = []
    for needed in map(Requirement, importlib.metadata.requires(PROJECT) or ()):
        found = _version(needed.name)
        applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if applies and not (found and needed.specifier.contains(found, prereleases=True)):
            bad.append(f"{needed.name} {found or 'missing'} (needs {needed.specifier})")
    if bad:
        raise UserError(f"{', '.join(bad)}; run scripts/setup.sh")
    yield Finding("packages", "all requirements are met")


def _version(package: str) -> str:
    return next((found.version for found in importlib.metadata.distributions(name=package)), "")


def check_torch() -> Iterator[Finding]:
    """PyTorch and the GPUs it sees."""
    yield Finding("PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        fix = "preset=tiny runs on the CPU; for the others install a GPU driver (nvidia-smi must work)"
        yield Finding("GPU", f"none that PyTorch can use; it was {built}", fix)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        yield Finding(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {precision}")


def check_simulation() -> Iterator[Finding]:
    """PyBullet, and what can draw its pictures."""
    try:
        from defi.sim.bullet import pybullet
    except UserError as error:
        yield Finding("PyBullet", *str(error).split("; ", 1))
        return
    yield Finding("PyBullet", f"{_version('pybullet')}, API {pybullet.getAPIVersion()}")
    for number, name in egl_devices().items():
        kind = "mesa" if SOFTWARE.search(name) else "gpu"
        yield Finding(f"EGL device {number}", f"{name} (sim.renderer={kind})")
    if not egl_devices():
        yield Finding("EGL", "no device can draw", f"CALVIN's assets need one: {MESA}")


def check_machine(output: Path) -> Iterator[Finding]:
    """Processors, memory, and free space on the disk of `output`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    yield Finding("machine", f"{cores} processors, {memory / 2**30:.0f} GiB of memory")
    place = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.is_dir())
    if not os.access(place, os.W_OK):
        raise UserError(f"{place} cannot be written to; choose another output=")
    free = shutil.disk_usage(place).free
    fix = "enough for preset=tiny; larger ones need tens of GB" if free < LOW_DISK else ""
    yield Finding("disk", f"{free / 1e9:.0f} GB free at {place}", fix)


def check_clone(calvin_root: str) -> Iterator[Finding]:
    """A clone of CALVIN: all scenes, every file that they name, the instructions; and what draws it here."""
    files = [Path(calvin_root) / WORDS]
    for scene in "ABCD":
        config = SceneConfig.from_calvin(calvin_root, scene)
        files += [config.arm.urdf, config.table.urdf, config.plane, *(block.urdf for block in config.blocks)]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]}: missing; run `git submodule update --init --recursive` in the clone")
    yield Finding("CALVIN", f"{calvin_root}: scenes A, B, C, D and the instructions are there")
    yield from check_pictures(calvin_root)


def check_pictures(calvin_root: str, scene: str = "D") -> Iterator[Finding]:
    """What draws a rollout on CALVIN's assets, and how far the other renderers' pictures are from that."""
    (chosen, pictures), *others = draw_with_each(calvin_root, scene).items()
    yield Finding("CALVIN's renderer", f"a rollout takes {chosen}")
    for renderer, drawn in others:
        detail = f"{renderer}: other pictures of scene {scene}: {describe_difference(pictures, drawn)}"
        fix = "leave sim.renderer as it is: such a number compares with no published one"
        yield Finding(f"sim.renderer={renderer.kind}", detail, fix if renderer.backend == "cpu" else "")


def check_simpler(simpler_root: str) -> Iterator[Finding]:
    """A clone of SimplerEnv: the files of all visual-matching episodes; SAPIEN, and what draws."""
    check_assets(Path(simpler_root), TASKS.values())
    yield Finding("SIMPLER", f"{simpler_root}: the assets of {len(TASKS)} tasks are there")
    check_packages()
    yield Finding("SAPIEN", f"{_version('sapien')}, drew a picture with {drawing()}")


def check_checkpoint(path: str) -> Iterator[Finding]:
    """A checkpoint: complete, and made in an environment like this one."""
    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    if missing := [key for key in ("stage", "preset", "step") if key not in manifest]:
        raise UserError(f"{folder / MANIFEST}: lacks {', '.join(missing)}; {COPY_AGAIN}")
    detail = f"{folder}: {manifest['stage']}, preset {manifest['preset']}, step {manifest['step']}"
    yield Finding("checkpoint", detail)
    here = environment()
    now, then = flatten(here), flatten({key: manifest[key] for key in here if key in manifest})
    for key in sorted(now.keys() | then.keys()):
        old, new, name = then.get(key), now.get(key), key.replace(".", " ", 1)
        if old != new:
            yield Finding(name, f"the checkpoint was made with {old}, here it is {new}", meaning(name, old))


def meaning(name: str, old: Any) -> str:
    """What it means that an entry of a manifest's environment was `old` and is something else now."""
    kind, _, part = name.partition(" ")
    if kind == "hardware":
        return "results differ in rounding; a resumed run continues, but not bit for bit"
    if kind in ("version", "git_commit"):
        change, same = "other code may compute something else", ""
        if kind == "git_commit" and old:
            same = f"git checkout {shlex.quote(str(old).removesuffix(CHANGED))}"  # the file may say anything
    else:
        change = "random choices may differ" if part in ("python", "numpy") else "results may differ"
        same = f"Python {old}" if part == "python" else f"pip install {shlex.quote(f'{part}=={old}')}"
    return f"{change}; {same} has the same" if same else change


def examine(what: str, check: Callable[..., Iterator[Finding]], *args: object) -> Iterator[Finding]:
    """The findings of a check; an error that it raises is one of them."""
    try:
        yield from check(*args)
    except UserError as error:
        detail, _, fix = str(error).partition("; ")
        yield Finding(what, detail, fix, wrong=True)


def report(found: Sequence[Finding]) -> Table:
    """The findings for the terminal; brackets in them are no markup, for a file may have put them there."""
    columns = (Column(header, overflow="fold") for header in ("what", "", "found", "how to fix it"))
    table = Table(*columns, box=None, pad_edge=False)
    for each in found:
        verdict = Text(each.verdict, STYLES[each.verdict])
        table.add_row(Text(each.what), verdict, Text(each.detail), Text(each.fix))
    return table


@entry("doctor")
def main(cfg: DictConfig) -> None:
    found = [
        *examine("packages", check_python),
        *examine("PyTorch", check_torch),
        *examine("simulation", check_simulation),
        *examine("disk", check_machine, Path(cfg.output)),
        *(examine("CALVIN", check_clone, cfg.calvin_root) if cfg.calvin_root else ()),
        *(examine("SIMPLER", check_simpler, cfg.simpler_root) if cfg.simpler_root else ()),
        *(examine("checkpoint", check_checkpoint, cfg.checkpoint) if cfg.checkpoint else ()),
    ]
    Console(highlight=False).print(report(found))
    sys.exit(any(finding.wrong for finding in found))


if __name__ == "__main__":
    main()
