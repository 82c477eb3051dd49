"""Collect demonstrations in CALVIN's format: `python -m defi.sim.collect output=data/demos`."""

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from defi import __version__
from defi.config import entry, typed
from defi.data.calvin import CalvinFolder
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError, writing
from defi.files import read_json
from defi.sim.scenes import builtin
from defi.sim.sessions import SESSIONS, CollectConfig, Record, Session, assemble, collect_sessions, plan
from defi.sim.tasks import TASKS

SETTINGS, MANIFEST = "settings.json", "manifest.json"


def start_folder(config: CollectConfig) -> Path:
    """The output folder, checked before anything is written, with the settings it is collected under."""
    output = check_output(config.output, resume=config.resume, overwrite=config.overwrite)
    written = output / SETTINGS
    if config.resume and output.is_dir() and any(output.iterdir()):
        before = read_json(written, "choose another output=, or overwrite=true")
        changed = [key for key, value in config.identity().items() if before.get(key) != value]
        if changed:
            problem = f"this collection was started with other settings ({', '.join(changed)})"
            raise UserError(f"{written}: {problem}; give the same ones, or overwrite=true")
    prepare_output(output, resume=config.resume, overwrite=config.overwrite)
    write_file(written, json.dumps(config.identity(), indent=1))
    return output


def collect(config: CollectConfig, output: Path, console: Console) -> dict[Session, Record]:
    """Collect what is missing, number the frames, write the index files."""
    sessions = plan(config)
    with writing(output, "the demonstrations"):
        finished = collect_sessions(sessions, config, output)
        records = dict(track(finished, "sessions", total=len(sessions), console=console))
        for name, split in config.splits.items() if config.record else ():
            assemble([session for session in sessions if session.split == name], output)
            merged_config = output / name / ".hydra" / "merged_config.yaml"
            merged_config.parent.mkdir(exist_ok=True)
            write_file(merged_config, simulator_config(split.scenes[0], config))
    return {session: records[session] for session in sessions}


def simulator_config(scene_name: str, config: CollectConfig) -> str:
    """The simulator's settings as YAML, under the names that CALVIN's merged_config.yaml uses."""
    scene, sizes = builtin(scene_name), (config.static_size, config.gripper_size)
    arm, blocks = scene.arm, [block.name for block in scene.blocks]
    values = {
        "cameras": {
            name: {"name": name, "fov": camera.fov, "nearval": camera.near, "farval": camera.far}
            | {"width": size, "height": size, "look_from": camera.look_from, "look_at": camera.look_at}
            | {"up_vector": camera.up}
            for (name, camera), size in zip(scene.cameras.items(), sizes)
        },
        "env": {"control_freq": 30, "bullet_time_step": 240.0, "seed": scene.seed},
        "scene": {"name": scene.name, "global_scaling": scene.scale, "euler_obs": True}
        | {"surfaces": scene.surfaces, "movable_objects": blocks},
        "robot": {"base_position": arm.base_position, "base_orientation": arm.base_euler}
        | {"initial_joint_positions": arm.rest_joints, "max_joint_force": arm.max_force}
        | {"gripper_force": arm.gripper_force},
        "seed": config.seed,
    }
    return OmegaConf.to_yaml(OmegaConf.create(values))


def success_rates(records: Iterable[Record]) -> dict[str, dict[str, float | int | None]]:
    """Per task that was tried: attempts, how many were solved, and the steps that took."""
    attempts = [attempt for record in records for attempt in record.attempts]
    rates = {}
    for task in TASKS:
        steps = [attempt["solved_after"] for attempt in attempts if attempt["task"] == task]
        solved = [count for count in steps if count is not None]
        if steps:
            median, longest = (float(np.median(solved)), max(solved)) if solved else (None, None)
            rates[task] = {"attempts": len(steps), "solved": len(solved), "rate": len(solved) / len(steps)}
            rates[task] |= {"median_steps": median, "max_steps": longest}
    return rates


def write_manifest(output: Path, config: CollectConfig, records: Mapping[Session, Record]) -> None:
    """What was collected, and how; written last."""
    splits = {name: CalvinFolder(output / name) for name in config.splits if config.record}
    splits = {
        name: {"frames": len(data.frame_ids), "spans": len(data.spans), "fingerprint": data.fingerprint}
        for name, data in splits.items()
    }
    sessions = [
        {"split": session.split, "scene": session.scene, "variation": session.variation}
        | {"frames": record.frames, "attempts": record.attempts}
        for session, record in records.items()
    ]
    manifest = {"version": __version__, "settings": config.identity(), "splits": splits}
    manifest |= {"success": success_rates(records.values()), "sessions": sessions}
    write_file(output / MANIFEST, json.dumps(manifest, indent=1))


@entry("collect")
def main(cfg: DictConfig) -> None:
    """Collect demonstrations; see configs/collect.yaml."""
    config = typed(CollectConfig, cfg, "collect")
    output, console = start_folder(config), Console()
    if (output / MANIFEST).is_file():
        shutil.rmtree(output / SESSIONS, ignore_errors=True)  # left by a run killed at its last step
        console.print(f"{output}: already complete")
        return
    start = time.perf_counter()
    records = collect(config, output, console)
    seconds = time.perf_counter() - start
    write_manifest(output, config, records)
    shutil.rmtree(output / SESSIONS)
    columns = "task", "attempts", "solved", "rate", "median steps", "most"
    table = Table(*columns, title="Success of the policies")
    for task, numbers in success_rates(records.values()).items():
        shown = (f"{number:.2f}" if isinstance(number, float) else number for number in numbers.values())
        table.add_row(task, *("–" if number is None else str(number) for number in shown))
    console.print(table)
    attempts = sum(len(record.attempts) for record in records.values())
    frames = sum(record.frames for record in records.values())
    console.print(f"{output}: {attempts} attempts, {frames} frames recorded in {seconds:.0f} s")


if __name__ == "__main__":
    main()
