"""SIMPLER's control steps per second on one core and its memory, beside the official loop's.

    python -m benchmarks.simpler --root ../SimplerEnv [--look 5] [--steps 60] [--official bin/python]

The arm makes small random moves. A policy looks every so many steps, as many as it carries out of a chunk;
the official environment draws in every step. Times are of the processor, so that company on the machine
counts little; each figure is of a process of its own, this project's and the official one's in turns.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from defi.benchmarks.simpler.check import drawing
from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.episodes import episodes

TASKS = ("widowx_carrot_on_plate", "widowx_put_eggplant_in_basket", "google_robot_pick_coke_can")
TASKS += ("google_robot_move_near_v0", "google_robot_open_top_drawer")
RAY_TRACED = ("google_robot_open_top_drawer",)  # officially: nothing to put beside rasterised pictures


def measure(root: Path, task: str, steps: int, look: int) -> dict[str, float]:
    """Seconds of the processor for a reset (the second: meshes and shaders are loaded) and a step with its
    share of a picture; MB of memory."""
    world, (first, second) = Simpler(root), episodes(task)[:2]
    world.reset(first)
    world.observe()
    random = np.random.default_rng(0)
    began = time.process_time()
    world.reset(second)
    reset = time.process_time() - began
    acted = seen = 0.0
    for step in range(steps):
        if step % look == 0:
            began = time.process_time()
            world.observe()
            seen += time.process_time() - began
        began = time.process_time()
        world.step(np.append(random.uniform(-0.01, 0.01, 6), 1.0))
        acted += time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    per_picture = seen / len(range(0, steps, look))
    return {"reset": reset, "step": acted / steps + per_picture / look, "memory": memory}


def found(command: list[Any]) -> dict[str, float]:
    """What a process of its own measures, with one thread to draw."""
    environment = os.environ | {"LP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(list(map(str, command)), env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(run.stdout.splitlines()[-1])


def row(runs: list[dict[str, float]]) -> tuple[float, str]:
    """Steps per second, and the table's cells: medians, of the memory the most."""
    reset, step = (median(run[key] for run in runs) for key in ("reset", "step"))
    memory = max(run["memory"] for run in runs)
    return 1 / step, f"{reset:9.2f} {1 / step:8.1f} {memory:6.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a clone of SimplerEnv")
    parser.add_argument("--look", type=int, default=5, help="a picture every so many steps")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure")
    parser.add_argument("--official", help="a Python that imports simpler_env (SAPIEN 2.2.2)")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(args.root, args.task, args.steps, args.look)))
        return
    print(f"{drawing()}; looking every {args.look} steps; seconds per reset, steps per second, MB")
    print(f"{'task':30}{'reset':>9} {'steps/s':>8} {'MB':>6}   official: as before, and times as fast")
    here = [sys.executable, "-m", "benchmarks.simpler", *sys.argv[1:], "--task"]
    there = [args.official, Path(__file__).with_name("simpler_itself.py"), args.steps]
    for task in TASKS:
        official = args.official is not None and task not in RAY_TRACED
        commands = [[*here, task]] + [[*there, task]] * official
        rounds = [[found(command) for command in commands] for _ in range(args.rounds)]
        ours, cells = row([each[0] for each in rounds])
        line = f"{task:30}{cells}"
        if official:
            its, cells = row([each[1] for each in rounds])
            line += f"{cells} {ours / its:6.1f} ×"
        print(line, flush=True)


if __name__ == "__main__":
    main()
