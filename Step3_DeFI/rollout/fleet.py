"""The simulator processes of one device: chains handed out, observations answered, dead ones replaced."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from defi.data.calvin import CAMERAS
from defi.engine.data import seed_of
from defi.errors import UserError
from Step3_DeFI import batching
from Step3_DeFI.acting import Policy
from Step3_DeFI.batching import Question
from Step3_DeFI.rollout.simulator import GONE, Actions, ChainResult, ChainSpec, Clip, Observation, Setup

MOST_DEATHS = 3
# A plain subprocess, not one of `multiprocessing`: that would import the main module again in every child,
# and with it PyTorch. Not `-m`: what is sent must not be of classes in a module called `__main__`.
PROGRAM = "from Step3_DeFI.rollout.simulator import main; main()"


class Simulator:
    """Handle of one simulator process: its chain, and whether it waits for the policy."""

    def __init__(self, setup: Setup) -> None:
        self.chain: ChainSpec | None = None
        self.waiting = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self.connection, theirs = Pipe()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **setup.environment},
        )
        theirs.close()
        self.send(setup)

    def send(self, message: Any) -> None:
        """Send, unless the process has died: that is noticed when its next message is read."""
        with suppress(*GONE):
            self.connection.send(message)
        self.last_contact = time.monotonic()

    def stop(self) -> str:
        """End the process; returns the last line it printed."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self._log.seek(0)
        with self._log:
            lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it printed nothing"


def shown(seen: Observation) -> dict[str, Any]:
    """What a simulator shows, as a policy takes it: with the names of CALVIN's robot."""
    images = {camera: seen.images[key] for camera, key in CAMERAS.items() if key in seen.images}
    return {"images": images, "instruction": seen.instruction, "state": seen.state}


class Batcher(batching.Batcher):
    """For simulators. So that a chain's actions are the same on any number of processes, a chain always takes
    the same row: its index modulo `batch`.

    Args:
        chunk: actions of each answer that are executed; None for all.
    """

    def __init__(self, policy: Policy, batch: int, chunk: int | None = None) -> None:
        super().__init__(policy, batch)
        self.chunk = chunk
        self._seen: dict[Hashable, Observation] = {}

    def add(self, asker: Hashable, seen: Observation) -> None:
        """An observation of `asker`, who waits for the answer."""
        self._seen[asker] = seen
        row = seen.seed[1] % self.batch
        self.waiting.append(Question(asker, shown(seen), seed_of("rollout", *seen.seed), row))

    def answer(self) -> Iterator[tuple[Hashable, Actions]]:
        """Call the policy once for the longest waiting observation of each row."""
        picked = self.take()
        actions = self.ask(picked)
        if actions.ndim != 3 or actions.shape[::2] != (self.batch, 7) or not actions.shape[1]:
            wanted = f"the simulator takes ({self.batch}, K, 7): position, rotation, gripper"
            raise UserError(f"the policy returned actions of shape {actions.shape}, {wanted}")
        for row, question in picked.items():
            seen = self._seen.pop(question.asker)
            if not np.isfinite(actions[row]).all():
                where = "chain {1}, {task}, observation {2}".format(*seen.seed, task=seen.task)
                fix = "its weights or its precision are broken, try another checkpoint"
                raise UserError(f"{where}: the policy returned NaN or infinite actions; {fix}")
            yield question.asker, actions[row, : self.chunk]


class Fleet:
    """Runs chains on `size` simulator processes. A context manager: leaving it ends them all.

    Args:
        batcher: answers the observations; None where the agents act inside the simulator processes.
        silence: seconds without a sign of life after which a process at work is replaced.
    """

    def __init__(self, setup: Setup, size: int, batcher: Batcher | None, *, silence: float = 300) -> None:
        self.setup, self.size, self.batcher, self.silence = setup, size, batcher, silence
        self.simulators: list[Simulator] = []
        self.replaced = 0
        self._pending: list[ChainSpec] = []
        self._deaths: Counter[int] = Counter()

    def __enter__(self) -> "Fleet":
        self.simulators = [Simulator(self.setup) for _ in range(self.size)]
        return self

    def __exit__(self, *_: object) -> None:
        for simulator in self.simulators:
            simulator.stop()

    def run(self, chains: Sequence[ChainSpec]) -> Iterator[Clip | ChainResult]:
        """Results in the order in which chains finish, each after its clips."""
        self._pending = list(chains)
        while self._pending or self._busy():
            for simulator in self.simulators:
                if simulator.chain is None and self._pending:
                    self._begin_chain(simulator)
            working = [simulator for simulator in self._busy() if not simulator.waiting]
            patience = self.batcher.patience(len(working)) if self.batcher else None
            ready = wait([s.connection for s in working], self.silence if patience is None else patience)
            for simulator in working:
                if simulator.connection in ready:
                    yield from self._handle(simulator)
                elif time.monotonic() - simulator.last_contact > self.silence:
                    self._replace(simulator, f"no sign of life for {self.silence:.0f} s")
            coming = sum(not simulator.waiting for simulator in self._busy())
            if self.batcher and self.batcher.patience(coming) == 0:
                for simulator, actions in self.batcher.answer():
                    simulator.waiting = False
                    simulator.send(actions)

    def _busy(self) -> list[Simulator]:
        return [simulator for simulator in self.simulators if simulator.chain is not None]

    def _begin_chain(self, simulator: Simulator) -> None:
        """The first pending chain whose row of the policy's batch the fewest running chains share."""
        rows = self.batcher.batch if self.batcher else 1
        taken = Counter(busy.chain.index % rows for busy in self._busy())
        simulator.chain = min(self._pending, key=lambda chain: taken[chain.index % rows])
        self._pending.remove(simulator.chain)
        simulator.send(simulator.chain)

    def _handle(self, simulator: Simulator) -> Iterator[Clip | ChainResult]:
        """Take the next message of a simulator."""
        simulator.last_contact = time.monotonic()
        try:
            message = simulator.connection.recv()
        except GONE:
            self._replace(simulator)
            return
        if isinstance(message, UserError):
            raise message
        if isinstance(message, Exception):
            raise RuntimeError(f"chain {simulator.chain.index}: {message}")
        if isinstance(message, Observation):
            self.batcher.add(simulator, message)
            simulator.waiting = True
            return
        if isinstance(message, ChainResult):
            simulator.chain = None
        yield message

    def _replace(self, simulator: Simulator, reason: str = "") -> None:
        """A new process for one that died; its chain is run again from the start."""
        chain, last_line = simulator.chain, simulator.stop()
        self._deaths[chain.index] += 1
        self.simulators[self.simulators.index(simulator)] = Simulator(self.setup)
        if self._deaths[chain.index] == MOST_DEATHS:
            died = f"its simulator process died {MOST_DEATHS} times ({reason or last_line})"
            fix = "finished chains are kept: remove the cause and continue with resume=true"
            raise UserError(f"chain {chain.index}: {died}; {fix}")
        self._pending.insert(0, chain)
        self.replaced += 1
