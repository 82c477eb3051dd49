"""Collect demonstrations in CALVIN's format: `python -m defi.sim.collect output=data/demos`."""

import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from defi import __version__
from defi.collecting import MANIFEST, in_processes, start_folder, success_rates, success_table
from defi.config import entry, typed
from defi.data.calvin import CalvinFolder
from defi.engine.output import write_file
from defi.errors import writing
from defi.sim.scenes import builtin
from defi.sim.sessions import SESSIONS, CollectConfig, Record, Session, assemble, collect_session, plan
from defi.sim.tasks import TASKS


def collect(config: CollectConfig, output: Path, console: Console) -> dict[Session, Record]:
    """Collect what is missing, number the frames, write the index files."""
    sessions = plan(config)
    with writing(output, "the demonstrations"):
        work = partial(collect_session, config=config, output=output)
        finished = in_processes(work, sessions, config.workers, output)
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


def rates_of(records: Mapping[Session, Record]) -> dict[str, dict[str, float | int | None]]:
    return success_rates([attempt for record in records.values() for attempt in record.attempts], TASKS)


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
    manifest |= {"success": rates_of(records), "sessions": sessions}
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
    console.print(success_table(rates_of(records)))
    attempts = sum(len(record.attempts) for record in records.values())
    frames = sum(record.frames for record in records.values())
    console.print(f"{output}: {attempts} attempts, {frames} frames recorded in {seconds:.0f} s")


if __name__ == "__main__":
    main()
