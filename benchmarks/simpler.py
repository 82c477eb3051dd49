"""SIMPLER's control steps per second on one core, and its memory.

    python -m benchmarks.simpler --root ../SimplerEnv [--look 5] [--steps 60]

The arm makes small random moves. A policy looks every so many steps, as many as it carries out of a chunk;
the official environment draws a picture in every step. Times are of the processor, so that company on the
machine counts little.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from defi.benchmarks.simpler.check import drawing
from defi.benchmarks.simpler.environment import Simpler
from defi.benchmarks.simpler.episodes import episodes

TASKS = ("widowx_carrot_on_plate", "widowx_put_eggplant_in_basket", "google_robot_pick_coke_can")
TASKS += ("google_robot_move_near_v0", "google_robot_open_top_drawer")


def measure(world: Simpler, task: str, steps: int, look: int) -> tuple[float, float, float]:
    """Seconds of the processor: a reset (the second: meshes and shaders are loaded), a step, a picture."""
    first, second = episodes(task)[:2]
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
    return reset, acted / steps, seen / len(range(0, steps, look))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a clone of SimplerEnv")
    parser.add_argument("--look", type=int, default=5, help="a picture every so many steps")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    print(drawing())
    print(f"looking every {args.look} steps; seconds per reset, step and picture")
    print(f"{'task':32} {'reset':>7} {'step':>7} {'picture':>8} {'steps/s':>8} {'MB':>5}")
    for task in TASKS:
        reset, step, picture = measure(Simpler(args.root), task, args.steps, args.look)
        rate = 1 / (step + picture / args.look)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{task:32} {reset:7.2f} {step:7.3f} {picture:8.3f} {rate:8.1f} {memory:5.0f}")


if __name__ == "__main__":
    main()
