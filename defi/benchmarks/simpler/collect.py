"""Collect demonstrations of SIMPLER's tasks: `python -m defi.benchmarks.simpler.collect output=data/simpler
simpler_root=../SimplerEnv`."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from defi import __version__
from defi.benchmarks.simpler import check
from defi.benchmarks.simpler.demonstrations import (
    FOLDER,
    CollectConfig,
    Demonstration,
    Demonstrations,
    demonstrate,
    plan,
)
from defi.benchmarks.simpler.episodes import TASKS
from defi.collecting import MANIFEST, check_same, in_processes, start_folder, success_rates, success_table
from defi.config import entry, typed
from defi.data.convert import writer_of
from defi.data.episode import share_of
from defi.engine.output import write_file
from defi.errors import UserError, writing
from defi.files import read_json

Records = Mapping[Demonstration, list[dict[str, Any]]]  # every attempt at each


def collect(config: CollectConfig, output: Path, console: Console) -> Records:
    """Collect what is missing, then write the data set."""
    demos = plan(config)
    with writing(output, "the demonstrations"):
        work = partial(demonstrate, config=config, output=output)
        finished = in_processes(work, demos, config.processes, output)
        records = dict(track(finished, "demonstrations", total=len(demos), console=console))
        records = {demo: records[demo] for demo in demos}
        if config.record:
            write_data(config, output, records, console)
    return records


def split(config: CollectConfig, records: Records) -> tuple[list[Demonstration], list[Demonstration]]:
    """Those that succeeded: for training, and held out, of each task the same share.

    Raises:
        UserError: there are none to train on.
    """
    kept = [demo for demo, attempts in records.items() if attempts[-1]["solved_after"] is not None]
    chosen = set(share_of([demo.task for demo in kept], config.held_out))
    training = [demo for number, demo in enumerate(kept) if number not in chosen]
    if not training:
        fix = "more demonstrations (demos_per_task), less noise, or a smaller share held_out"
        raise UserError(f"{config.output}: {len(kept)} demonstrations, none of them to train on; {fix}")
    return training, [kept[number] for number in sorted(chosen)]


def write_data(config: CollectConfig, output: Path, records: Records, console: Console) -> None:
    """Anew, whatever a killed run has left of it; beside the demonstrations until all is there."""
    training, held_out = split(config, records)
    data, folder = Demonstrations(output, [*training, *held_out], config.robot), output / FOLDER / "written"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer = writer_of(config.format, data, folder, config.pictures, name=Path(config.output).name)
    for number in track(range(len(data)), f"writing {config.format}", console=console):
        writer.add(data.episode(number), "train" if number < len(training) else "val")
    writer.close()
    for made in folder.iterdir():
        if (place := output / made.name).is_dir():  # of a run that was killed just here
            shutil.rmtree(place)
        os.replace(made, place)


def write_manifest(output: Path, config: CollectConfig, records: Records) -> None:
    """What was collected, and how; written last."""
    attempts = [attempt for each in records.values() for attempt in each]
    manifest: dict[str, Any] = {"version": __version__, "settings": config.settings()}
    if config.record:
        parts = zip(("train", "val"), split(config, records))
        steps = {demo: attempts[-1]["steps"] for demo, attempts in records.items()}
        manifest["splits"] = {
            part: {"episodes": len(demos), "frames": sum(steps[demo] for demo in demos)}
            for part, demos in parts
        }
    manifest["success"] = success_rates(attempts, config.tasks)
    manifest["demonstrations"] = {demo.name: attempts for demo, attempts in records.items()}
    write_file(output / MANIFEST, json.dumps(manifest, indent=1))


@entry("collect_simpler")
def main(cfg: DictConfig) -> None:
    """Collect demonstrations; see configs/collect_simpler.yaml."""
    config = typed(CollectConfig, cfg, "collect_simpler")
    check.check_packages()
    check.check_assets(Path(config.simpler_root), [TASKS[task] for task in config.tasks])
    if config.record:
        check.drawing()
    output, console = start_folder(config), Console()
    if (told := output / MANIFEST).is_file():
        check_same(told, read_json(told, "overwrite=true").get("settings", {}), config.settings())
        shutil.rmtree(output / FOLDER, ignore_errors=True)  # left by a run killed at its last step
        console.print(f"{output}: already complete")
        return
    # One process per core: threads within one would only be in the others' way.
    os.environ.update(LP_NUM_THREADS="1", OMP_NUM_THREADS="1")
    start = time.perf_counter()
    records = collect(config, output, console)
    seconds = time.perf_counter() - start
    write_manifest(output, config, records)
    shutil.rmtree(output / FOLDER)
    attempts = [attempt for each in records.values() for attempt in each]
    console.print(success_table(success_rates(attempts, config.tasks)))
    if not config.record:
        disturbed = sum(attempt["disturbed"] for attempt in attempts)
        said = f"{len(attempts)} attempts, {disturbed} of them disturbed (noise_probability)"
        console.print(f"{output}: {said}, in {seconds:.0f} s, nothing recorded")
        return
    training, held_out = split(config, records)
    frames = sum(records[demo][-1]["steps"] for demo in (*training, *held_out))
    failed = len(attempts) - len(training) - len(held_out)
    console.print(
        f"{output}: {len(training)} demonstrations to train on, {len(held_out)} held out, {frames} frames, "
        f"in {seconds:.0f} s; {failed} attempts failed and are left out"
    )
    if given_up := len(records) - len(training) - len(held_out):
        console.print(f"{given_up} demonstrations are missing: {config.attempts} starts each, none solved")
    if config.format == "lerobot" and held_out:
        console.print("the held-out ones are a split: data.split=train data.held_out=val")


if __name__ == "__main__":
    main()
