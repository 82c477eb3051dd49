"""Environment steps per second of a rollout: `python -m benchmarks.rollout [--calvin-root DIR]`.

Compares, in one run on one machine, with a stub policy that answers at once and looks every 10 steps, for the
CPU's renderer and (with CALVIN's assets) for EGL:
  plain     one process that draws both cameras at every step and judges, as published evaluations do
  official  the same loop with the package calvin_env, where it is installed
  rollout   Step3_DeFI.rollout: one simulator process per processor, pictures only when the policy looks
and prints how much of the processors' time the rollout spends where, and the memory of its simulators. Rates
are per second of the clock and, so that other work on the machine does not count, of processor time.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timed_world import TimedWorld
from defi.benchmarks.calvin.benchmark import Calvin, SimConfig
from defi.benchmarks.calvin.environment import ChainEnvironment
from defi.data.calvin import calvin_robot
from defi.sim.renderers import KINDS, Renderer, egl_devices, find_renderer
from Step3_DeFI.rollout.config import RolloutConfig, VideoConfig
from Step3_DeFI.rollout.evaluate import Evaluation, run_episodes

PROCESSORS = len(os.sched_getaffinity(0))
CHUNK = 10
SMALL = 0.3  # of an action's range: the arm moves all the time and stays near the table


@dataclasses.dataclass(frozen=True)
class Rate:
    """Control steps per second of the clock, and per second of processor time."""

    clock: float
    processor: float


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[int], Rate]]:
    """The rate of so many steps since it was entered; child processes count once they have ended."""

    def used() -> float:
        return sum(
            spent.ru_utime + spent.ru_stime
            for spent in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    clock, processor = time.perf_counter(), used()
    yield lambda steps: Rate(steps / (time.perf_counter() - clock), steps / (used() - processor))


class StubPolicy:
    """Random small motions, at once."""

    robot = calvin_robot()

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> np.ndarray:
        rngs = [np.random.default_rng(seed) for seed in seeds]
        return np.stack([rng.uniform(-SMALL, SMALL, (CHUNK, 7)) for rng in rngs])


def plain_loop(sim: SimConfig, scene: str, steps: int) -> Rate:
    """One process that draws and judges at every step."""
    os.environ["LP_NUM_THREADS"] = str(PROCESSORS)  # Mesa's default: this process is the only one
    benchmark = Calvin(chains=1, scene=scene, sim=sim, max_steps=[steps + 1])
    (chain,), environment = benchmark.episodes(0), benchmark.environment()
    environment.reset(dataclasses.replace(chain, tasks=("open_drawer",)))
    rng = np.random.default_rng(0)
    with stopwatch() as rate:
        for _ in range(steps):
            environment.step(np.append(rng.uniform(-SMALL, SMALL, 6), 1.0))
            environment.observe()
        return rate(steps)


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
    benchmark = Calvin(chains=chains, scene=scene, max_steps=[limit], sim=sim)
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation.prepare(benchmark, RolloutConfig(chunk=CHUNK, videos=VideoConfig(chains=0)))
        backend = "cpu" if evaluation.simulation.kind == "cpu" else "egl"
        timed = partial(TimedWorld, Path(folder), benchmark.load_scene(), renderer=backend)
        simulation = dataclasses.replace(evaluation.simulation, make=partial(ChainEnvironment, timed, limit))
        evaluation = dataclasses.replace(evaluation, simulation=simulation)
        memory = MemoryWatch()
        memory.start()
        with stopwatch() as rate:
            results = run_episodes(evaluation, "policy", StubPolicy(), show=False)
            steps = sum(result.control_steps for result in results)
            found = rate(steps)
        memory.close()
        spent = Counter()
        for file in Path(folder).glob("*.json"):
            spent.update(json.loads(file.read_text()))
    return {
        "rate": found,
        "shares": Counter({what: seconds * found.processor / steps for what, seconds in spent.items()}),
        "peak_memory_mb": memory.peak / 1e6,
        "own_memory_mb": memory.own / 1e6,
    }


def compare(given: argparse.Namespace, renderer: Renderer) -> None:
    """Measure and print all loops with one renderer."""
    sim = SimConfig(calvin_root=given.calvin_root, renderer=renderer.kind)
    print(f"{renderer}, scene {given.scene}")
    loops = {"plain": sim}
    if given.calvin_root and importlib.util.find_spec("calvin_env"):
        loops["official"] = dataclasses.replace(sim, backend="calvin_env")
    rates: dict[str, Rate] = {}
    for name, loop in loops.items():
        with renderer.process() as process:  # calvin_env needs PyBullet's first connection
            drawn = process.submit(plain_loop, loop, given.scene, given.plain_steps)
            rates[name] = drawn.result()
        print(row(name, rates[name], "steps/s, one process, both cameras at every step"))
    found = rollout(sim, given.scene, given.chains, given.limit)
    rate = found["rate"]
    print(row("rollout", rate, f"steps/s, {PROCESSORS} simulator processes"))
    for name, other in rates.items():
        ratio = Rate(rate.clock / other.clock, rate.processor / other.processor)
        print(row("ratio", ratio, f"× {name}"))
    shares = found["shares"]
    busy = shares["physics"] + shares["rendering"]
    listed = ", ".join(f"{what} {share:.0%}" for what, share in sorted(shares.items(), key=lambda x: -x[1]))
    print(f"  share     {busy:8.0%} of the processor time in physics and rendering ({listed})")
    own = f"{found['own_memory_mb']:.0f} MB its own share"
    print(f"  memory    {found['peak_memory_mb']:8.0f} MB at most per simulator, {own}")


def row(name: str, rate: Rate, unit: str) -> str:
    return f"  {name:9} {rate.clock:8.1f} {unit}; {rate.processor:.1f} by processor time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calvin-root", help="a clone of CALVIN; default: the built-in table")
    parser.add_argument("--renderers", nargs="+", choices=KINDS, help="default: all that are compared")
    parser.add_argument("--scene", default="D")
    parser.add_argument("--chains", type=int, default=40)
    parser.add_argument("--limit", type=int, default=120, help="control steps per task")
    parser.add_argument("--plain-steps", type=int, default=200)
    given = parser.parse_args()
    kinds = ["cpu", "egl"] if given.calvin_root and egl_devices() else ["cpu"]
    for kind in given.renderers or kinds:
        compare(given, find_renderer(kind))


if __name__ == "__main__":
    main()
