"""Collect demonstrations in CALVIN's format: `python -m defi.sim.collect output=data/demos`."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from defi import __version__
from defi.calvin import TRAINING, VALIDATION, CalvinFolder
from defi.config import entry
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from defi.sim.experts import EXPERT_TASKS
from defi.sim.play import PlaySettings, Record, path_to
from defi.sim.scene import SceneConfig
from defi.sim.scenes import FAMILIES, builtin
from defi.sim.sequences import initial_states
from defi.sim.tasks import check_tasks
from defi.sim.units import UNITS, Settings, Share, Unit, assemble, plan, run

UNSEEN = "D"
SETTINGS, MANIFEST = "settings.json", "manifest.json"


def read_settings(cfg: DictConfig) -> Settings:
    """The checked settings of `configs/collect.yaml`; raises UserError on values that make no sense."""
    tasks = EXPERT_TASKS if cfg.tasks == "all" else check_tasks(_names(cfg.tasks, "tasks"))
    unknown = [task for task in tasks if task not in EXPERT_TASKS]
    if unknown:
        raise UserError(f"tasks={','.join(unknown)}: no expert; choose from {', '.join(EXPERT_TASKS)}")
    _check_reachable(tasks)
    for key in ("workers", "demos_per_task", "demos_per_unit", "static_size", "gripper_size", "play.hold"):
        _at_least(cfg, key, 1)
    for key in ("variations", "validation.demos_per_task"):
        _at_least(cfg, key, 0)
    training_scenes = _scenes(cfg.scenes, "scenes")
    if cfg.variations and UNSEEN in training_scenes:
        raise UserError(f"scenes: {UNSEEN} has no variations to train on; set variations=0")
    splits = {
        TRAINING: Share(training_scenes, cfg.variations, cfg.demos_per_task, phrasings=None),
        VALIDATION: Share(
            _scenes(cfg.validation.scenes, "validation.scenes"), 0, cfg.validation.demos_per_task, phrasings=1
        ),
    }
    return Settings(
        seed=cfg.seed,
        tasks=tuple(tasks),
        splits={name: share for name, share in splits.items() if share.demos_per_task},
        demos_per_unit=cfg.demos_per_unit,
        static_size=cfg.static_size,
        gripper_size=cfg.gripper_size,
        play=PlaySettings(**cfg.play),
    )


def _names(value: ListConfig | str, key: str) -> list[str]:
    names = [str(name) for name in value] if isinstance(value, ListConfig) else [str(value)]
    if not names:
        raise UserError(f"{key}=[]: name at least one")
    return names


def _scenes(value: ListConfig | str, key: str) -> tuple[str, ...]:
    names = tuple(_names(value, key))
    for name in names:
        if name not in FAMILIES:
            raise UserError(f"{key}: there is no scene {name}; choose from {', '.join(FAMILIES)}")
    return names


def _at_least(cfg: DictConfig, key: str, low: int) -> None:
    value = OmegaConf.select(cfg, key)
    if not isinstance(value, int) or value < low:
        raise UserError(f"{key}={value}: expected a whole number of {low} or more")


def _check_reachable(tasks: Sequence[str]) -> None:
    for task in tasks:
        if not any(path_to(state, [task], EXPERT_TASKS) for state in initial_states()):
            raise UserError(f"tasks: {task} cannot be reached from any start state; leave it out")


def simulator_config(scene: SceneConfig, settings: Settings) -> str:
    """The simulator's settings as YAML, under the names that CALVIN's merged_config.yaml uses."""
    cameras = {
        name: {"name": name, "fov": camera.fov, "nearval": camera.near, "farval": camera.far}
        | {"width": size, "height": size, "look_from": camera.look_from, "look_at": camera.look_at}
        | {"up_vector": camera.up}
        for (name, camera), size in zip(scene.cameras.items(), (settings.static_size, settings.gripper_size))
    }
    config = {
        "cameras": cameras,
        "env": {"control_freq": 30, "bullet_time_step": 240.0, "seed": scene.seed},
        "scene": {
            "name": scene.name,
            "global_scaling": scene.scale,
            "euler_obs": True,
            "surfaces": scene.surfaces,
            "movable_objects": [block.name for block in scene.blocks],
        },
        "robot": {
            "base_position": scene.arm.base_position,
            "base_orientation": scene.arm.base_euler,
            "initial_joint_positions": scene.arm.rest_joints,
            "max_joint_force": scene.arm.max_force,
            "gripper_force": scene.arm.gripper_force,
        },
        "seed": settings.seed,
    }
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(config))))


def start_folder(cfg: DictConfig, settings: Settings) -> Path:
    """The output folder, checked before anything is written, with the settings it is collected under."""
    output = check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    written = output / SETTINGS
    text = json.dumps(asdict(settings), indent=1)
    if cfg.resume and output.is_dir() and any(output.iterdir()):
        if not written.is_file():
            raise UserError(f"{output}: no {SETTINGS}, so nothing to resume; choose another output=")
        before, now = json.loads(written.read_text()), json.loads(text)
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(
                f"{written}: the data were begun with other settings ({', '.join(changed)}); "
                f"give the same ones, or overwrite=true"
            )
    prepare_output(output, resume=cfg.resume, overwrite=cfg.overwrite)
    write_file(written, text)
    return output


def collect(settings: Settings, output: Path, workers: int, console: Console) -> list[Record]:
    """Collect what is missing, number the frames, write the index files."""
    units = plan(settings)
    records: dict[str, Record] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("collecting", total=sum(len(unit.tasks) for unit in units))
        try:
            for unit, record in run(units, settings, output, workers):
                records[unit.name] = record
                progress.advance(bar, len(unit.tasks))
            assemble(units, settings, output)
        except OSError as error:
            raise UserError(
                f"{error.filename or output}: {error.strerror}; make room, then continue with resume=true"
            ) from None
    for split, share in settings.splits.items():
        config = output / split / ".hydra" / "merged_config.yaml"
        config.parent.mkdir(exist_ok=True)
        write_file(config, simulator_config(builtin(share.scenes[0]), settings))
    return [records[unit.name] for unit in units]


def write_manifest(
    output: Path, settings: Settings, units: Sequence[Unit], records: Sequence[Record]
) -> None:
    """What was collected, and how; written last."""
    entries = [
        {"split": unit.split, "scene": unit.scene, "variation": unit.variation, "frames": record.frames}
        | {"attempts": [asdict(attempt) for attempt in record.attempts]}
        for unit, record in zip(units, records)
    ]
    splits = {
        split: {"frames": len(data.frame_ids), "spans": len(data.spans), "fingerprint": data.fingerprint}
        for split in settings.splits
        for data in [CalvinFolder(output / split)]
    }
    manifest = {"version": __version__, "settings": asdict(settings), "splits": splits, "units": entries}
    write_file(output / MANIFEST, json.dumps(manifest, indent=1))


def summary(tasks: Iterable[str], records: Sequence[Record]) -> Table:
    """Demonstrations, attempts and length per task."""
    attempts = [attempt for record in records for attempt in record.attempts]
    table = Table("task", *("demonstrations", "attempts", "solved", "frames"), title="Demonstrations")
    for column in table.columns[1:]:
        column.justify = "right"
    tried = Counter(attempt.task for attempt in attempts)
    solved = Counter(attempt.task for attempt in attempts if attempt.solved)
    steps = Counter()
    for attempt in attempts:
        steps[attempt.task] += attempt.steps * attempt.solved
    for task in [*tasks, *sorted(set(tried) - set(tasks))]:
        n = solved[task]
        rate = f"{n / tried[task]:.0%}" if tried[task] else "–"
        table.add_row(task, str(n), str(tried[task]), rate, f"{steps[task] / n:.0f}" if n else "–")
    return table


@entry("collect")
def main(cfg: DictConfig) -> None:
    """Collect demonstrations; see configs/collect.yaml."""
    settings = read_settings(cfg)
    output = start_folder(cfg, settings)
    console = Console()
    if (output / MANIFEST).is_file():
        shutil.rmtree(output / UNITS, ignore_errors=True)  # left by a run killed at its last step
        console.print(f"{output}: already complete")
        return
    start = time.perf_counter()
    records = collect(settings, output, cfg.workers, console)
    seconds = time.perf_counter() - start
    write_manifest(output, settings, plan(settings), records)
    shutil.rmtree(output / UNITS)
    console.print(summary(settings.tasks, records))
    frames = sum(record.frames for record in records)
    console.print(f"{output}: {frames} frames in {seconds:.0f} s ({frames / seconds:.0f} per second)")


if __name__ == "__main__":
    main()
