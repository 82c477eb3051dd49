"""Environment steps per second of a rollout: `python -m benchmarks.rollout [--calvin-root DIR]`.

Compares, in one run on one machine, with a stub policy that answers at once and looks every 10 steps:
  plain     one process that draws both cameras at every step and judges, as published evaluations do
  official  the same loop with the package calvin_env, where it is installed
  rollout   Step3_DeFI.rollout: one simulator process per processor, pictures only when the policy looks
and prints how much of the processors' time the rollout spends where, and the memory of its simulators.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timed_world import TimedWorld
from defi.sim.judge import solved
from Step3_DeFI.rollout.config import RolloutConfig, SimConfig, VideoConfig
from Step3_DeFI.rollout.evaluate import Evaluation, run_chains
from Step3_DeFI.rollout.messages import Look
from Step3_DeFI.rollout.protocol import build_scene, world_maker

CHUNK = 10
SMALL = 0.3  # of an action's range: the arm moves all the time and stays near the table


class StubPolicy:
    """Random small motions, at once."""

    def act(self, looks: Sequence[Look]) -> np.ndarray:
        chunks = [np.random.default_rng(look.seed).uniform(-SMALL, SMALL, (CHUNK, 7)) for look in looks]
        return np.stack(chunks)


def plain_loop(sim: SimConfig, scene: str, steps: int) -> float:
    """Steps per second of one process that draws and judges at every step."""
    evaluation = Evaluation.prepare(RolloutConfig(chains=1, scene=scene, sim=sim))
    trial = evaluation.trials[0]
    world = world_maker(sim, build_scene(sim, scene), "cpu")()
    world.reset(trial.robot_obs, trial.scene_obs)
    start = world.state()
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(steps):
        world.step(np.append(rng.uniform(-SMALL, SMALL, 6), 1.0))
        world.render()
        solved("open_drawer", start, world.state())
    return steps / (time.perf_counter() - began)


def official_loop(sim: SimConfig, scene: str, steps: int) -> float:
    """The same with calvin_env, in a process of its own: it shares PyBullet's first connection."""
    sim = dataclasses.replace(sim, backend="calvin_env")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(plain_loop, (sim, scene, steps))


class MemoryWatch(threading.Thread):
    """Largest resident memory of any simulator process, in bytes, and its share that is its own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.own = 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.5):
            for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
                for pid in child.read_text().split():
                    self._look(Path("/proc") / pid)

    def _look(self, process: Path) -> None:
        try:
            if b"rollout.simulator" not in (process / "cmdline").read_bytes():
                return
            status = (process / "status").read_text()
            rollup = (process / "smaps_rollup").read_text()
        except OSError:
            return  # it has ended
        self.peak = max(self.peak, _kilobytes(status, "VmHWM:") * 1024)
        self.own = max(self.own, _kilobytes(rollup, "Pss:") * 1024)

    def close(self) -> None:
        self._over.set()
        self.join()


def _kilobytes(text: str, key: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(key)), 0)


def rollout(sim: SimConfig, scene: str, chains: int, limit: int) -> dict[str, Any]:
    """Steps per second of a rollout, and where the time went."""
    config = RolloutConfig(
        chains=chains, scene=scene, max_steps=[limit], chunk=CHUNK, sim=sim, videos=VideoConfig(chains=0)
    )
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation.prepare(config)
        timed = partial(TimedWorld, Path(folder), build_scene(sim, scene))
        evaluation = dataclasses.replace(evaluation, make_world=timed)
        memory = MemoryWatch()
        memory.start()
        began = time.perf_counter()
        results = run_chains(evaluation, "policy", StubPolicy(), show=False)
        wall = time.perf_counter() - began
        memory.close()
        spent = Counter()
        for file in Path(folder).glob("*.json"):
            spent.update(json.loads(file.read_text()))
    processors = len(os.sched_getaffinity(0))
    return {
        "steps_per_s": sum(result.control_steps for result in results) / wall,
        "shares": {what: seconds / wall / processors for what, seconds in spent.items()},
        "peak_memory_mb": memory.peak / 1e6,
        "own_memory_mb": memory.own / 1e6,
        "simulators": processors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calvin-root", help="a clone of CALVIN; default: the built-in table")
    parser.add_argument("--scene", default="D")
    parser.add_argument("--chains", type=int, default=40)
    parser.add_argument("--limit", type=int, default=120, help="control steps per task")
    parser.add_argument("--plain-steps", type=int, default=200)
    given = parser.parse_args()
    sim = SimConfig(calvin_root=given.calvin_root)

    plain = plain_loop(sim, given.scene, given.plain_steps)
    print(f"plain      {plain:8.1f} steps/s, one process, both cameras at every step")
    if given.calvin_root and importlib.util.find_spec("calvin_env"):
        official = official_loop(sim, given.scene, given.plain_steps)
        print(f"official   {official:8.1f} steps/s, the same with calvin_env")
    found = rollout(sim, given.scene, given.chains, given.limit)
    print(f"rollout    {found['steps_per_s']:8.1f} steps/s, {found['simulators']} simulator processes")
    print(f"ratio      {found['steps_per_s'] / plain:8.1f} × plain")
    if given.calvin_root and importlib.util.find_spec("calvin_env"):
        print(f"ratio      {found['steps_per_s'] / official:8.1f} × official")
    shares = found["shares"]
    busy = shares["physics"] + shares["rendering"]
    listed = ", ".join(f"{what} {share:.0%}" for what, share in sorted(shares.items(), key=lambda x: -x[1]))
    print(f"share      {busy:8.0%} of the processors' time in physics and rendering ({listed})")
    own = f"{found['own_memory_mb']:.0f} MB its own share"
    print(f"memory     {found['peak_memory_mb']:8.0f} MB at most per simulator, {own}")


if __name__ == "__main__":
    main()
