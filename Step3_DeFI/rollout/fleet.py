"""All simulator processes of one device: chains handed out, looks answered, dead processes replaced."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from defi.errors import UserError
from Step3_DeFI.rollout.messages import ChainResult, Clip, Failure, Look, Setup, Trial
from Step3_DeFI.rollout.server import PolicyServer

MOST_DEATHS = 3
GONE = (EOFError, BrokenPipeError, ConnectionResetError)


class Simulator:
    """Handle of one simulator process.

    A plain subprocess, not one of `multiprocessing`: that would import the main module again in every child,
    and with it PyTorch.
    """

    def __init__(self, setup: Setup) -> None:
        self.trial: Trial | None = None
        self.waiting = False  # for the policy
        self.heard = time.monotonic()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self.connection, theirs = Pipe()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "Step3_DeFI.rollout.simulator", str(theirs.fileno())],
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
        self.heard = time.monotonic()

    def start(self, trial: Trial) -> None:
        self.trial = trial
        self.send(trial)

    def receive(self) -> Look | Clip | ChainResult | Failure | None:
        """Its next message; None if it has died."""
        self.heard = time.monotonic()
        try:
            return self.connection.recv()
        except GONE:
            return None

    def silent_for(self) -> float:
        """Seconds since it was last heard of or told something."""
        return time.monotonic() - self.heard

    def last_words(self) -> str:
        """The last line it printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")

    def stop(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self._log.close()


class ChainQueue:
    """Chains to run. The next one is the first whose row of the policy's batch is the least taken."""

    def __init__(self, trials: Sequence[Trial], server: PolicyServer | None) -> None:
        self.pending, self.server = list(trials), server
        self.taken: Counter[int] = Counter()

    def _row(self, trial: Trial) -> int:
        return self.server.row(trial.index) if self.server else 0

    def next(self) -> Trial:
        trial = min(self.pending, key=lambda trial: self.taken[self._row(trial)])
        self.pending.remove(trial)
        self.taken[self._row(trial)] += 1
        return trial

    def ended(self, trial: Trial, *, again: bool = False) -> None:
        """A chain is finished, or (`again`) goes back to the front of the queue."""
        self.taken[self._row(trial)] -= 1
        if again:
            self.pending.insert(0, trial)


class Fleet:
    """Runs chains on `size` simulator processes. A context manager: leaving it ends them all.

    Args:
        server: answers the looks; None where the agents act inside the simulator processes.
        silence: seconds without a sign of life after which a process at work is replaced.
    """

    def __init__(self, setup: Setup, size: int, server: PolicyServer | None, *, silence: float = 300) -> None:
        self.setup, self.server, self.silence = setup, server, silence
        self.simulators: list[Simulator] = []
        self.size = size
        self.replaced = 0
        self._deaths: Counter[int] = Counter()

    def __enter__(self) -> "Fleet":
        self.simulators = [Simulator(self.setup) for _ in range(self.size)]
        return self

    def __exit__(self, *_: object) -> None:
        for simulator in self.simulators:
            simulator.stop()

    def run(self, trials: Sequence[Trial]) -> Iterator[Clip | ChainResult]:
        """Results in the order in which chains finish, each after its clips."""
        queue = ChainQueue(trials, self.server)
        while queue.pending or self._busy():
            for simulator in self.simulators:
                if simulator.trial is None and queue.pending:
                    simulator.start(queue.next())
            working = [simulator for simulator in self._busy() if not simulator.waiting]
            for simulator in self._listen(working):
                yield from self._handle(simulator, simulator.receive(), queue)
            for simulator in working:
                if simulator.silent_for() > self.silence and simulator in self.simulators:
                    self._replace(simulator, queue, f"no sign of life for {self.silence:.0f} s")
            if self.server and self.server.patience(self._coming()) == 0:
                for simulator, actions in self.server.answer():
                    simulator.waiting = False
                    simulator.send(actions)

    def _busy(self) -> list[Simulator]:
        return [simulator for simulator in self.simulators if simulator.trial is not None]

    def _coming(self) -> int:
        """Simulators that may ask soon."""
        return sum(not simulator.waiting for simulator in self._busy())

    def _listen(self, working: Sequence[Simulator]) -> list[Simulator]:
        """Those that have something to say, as soon as there are any or the policy should be called."""
        patience = self.server.patience(len(working)) if self.server else None
        timeout = self.silence if patience is None else patience
        ready = wait([simulator.connection for simulator in working], timeout)
        return [simulator for simulator in working if simulator.connection in ready]

    def _handle(self, simulator: Simulator, message: Any, queue: ChainQueue) -> Iterator[Clip | ChainResult]:
        if message is None:
            self._replace(simulator, queue, simulator.last_words())
        elif isinstance(message, Failure):
            raise message.error(simulator.trial.index)
        elif isinstance(message, Look):
            self.server.add(simulator, message)
            simulator.waiting = True
        else:
            if isinstance(message, ChainResult):
                queue.ended(simulator.trial)
                simulator.trial = None
            yield message

    def _replace(self, simulator: Simulator, queue: ChainQueue, reason: str) -> None:
        """A new process for one that died; its chain is run again from the start."""
        trial = simulator.trial
        self._deaths[trial.index] += 1
        if self._deaths[trial.index] == MOST_DEATHS:
            raise UserError(
                f"chain {trial.index}: its simulator process died {MOST_DEATHS} times ({reason}); "
                "finished chains are kept: mend the cause and continue with resume=true"
            )
        queue.ended(trial, again=True)
        simulator.stop()
        self.simulators[self.simulators.index(simulator)] = Simulator(self.setup)
        self.replaced += 1
