"""The simulator processes of one device: episodes handed out, observations answered, dead ones replaced."""

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

import numpy as np
from jaxtyping import Float

from defi.benchmarks.benchmark import Episode
from defi.engine.data import seed_of
from defi.errors import Fault, UserError
from Step3_DeFI.acting import Policy
from Step3_DeFI.batching import Batcher, Question
from Step3_DeFI.rollout.simulator import GONE, Clip, EpisodeResult, Look, Setup

MOST_DEATHS = 3
# A plain subprocess, not one of `multiprocessing`: that would import the main module again in every child,
# and with it PyTorch. Not `-m`: what is sent must not be of classes in a module called `__main__`.
PROGRAM = "from Step3_DeFI.rollout.simulator import main; main()"


class Simulator:
    """Handle of one simulator process: its episode, and what it waits to be told about by the policy."""

    def __init__(self, setup: Setup) -> None:
        self.episode: Episode | None = None
        self.world = ""
        self.look: Look | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self.connection, theirs = Pipe()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **setup.variables},
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


class PatientBatcher(Batcher):
    """One that says when to call: those who are asked about may be about to ask."""

    def __init__(self, policy: Policy, batch: int) -> None:
        super().__init__(policy, batch)
        self._call_seconds, self.calls = 0.0, 0

    def patience(self, coming: int) -> float | None:
        """Seconds to wait for more questions before calling the policy; None if nobody waits.

        A full batch goes at once, and so does one that nobody else can join (`coming` counts those who will
        ask soon). Otherwise half a call's duration is waited: a call costs the same, however full.
        """
        if not self.waiting:
            return None
        if not coming or len({question.row for question in self.waiting}) == self.batch:
            return 0.0
        return max(0.0, self.waiting[0].since + self._call_seconds / 2 - time.monotonic())

    def ask(self, picked: dict[int, Question]) -> Float[np.ndarray, "B K A"]:
        began = time.monotonic()
        actions = super().ask(picked)
        self._call_seconds, self.calls = time.monotonic() - began, self.calls + 1
        return actions


class Fleet:
    """Runs episodes on `size` simulator processes. A context manager: leaving it ends them all.

    So that an episode's actions are the same on any number of processes, it always takes the same row of the
    policy's batch: its index modulo the number of rows.

    Args:
        batcher: answers what simulators see; None where the agents act inside the simulator processes.
        chunk: actions of each answer that are executed; None for all.
        actions: numbers of an action.
        noun: what the benchmark calls an episode.
        silence: seconds without a sign of life after which a process at work is replaced.
    """

    def __init__(
        self,
        setup: Setup,
        size: int,
        batcher: PatientBatcher | None = None,
        *,
        chunk: int | None = None,
        actions: int = 0,
        noun: str = "episode",
        silence: float = 300,
    ) -> None:
        self.setup, self.size, self.batcher, self.silence = setup, size, batcher, silence
        self.chunk, self.actions, self.noun = chunk, actions, noun
        self.simulators: list[Simulator] = []
        self.replaced = 0
        self._pending: list[Episode] = []
        self._deaths: Counter[int] = Counter()

    def __enter__(self) -> "Fleet":
        self.simulators = [Simulator(self.setup) for _ in range(self.size)]
        return self

    def __exit__(self, *_: object) -> None:
        for simulator in self.simulators:
            simulator.stop()

    def run(self, episodes: Sequence[Episode]) -> Iterator[Clip | EpisodeResult]:
        """Results in the order in which episodes finish, each after its clips."""
        self._pending = list(episodes)
        while self._pending or self._busy():
            for simulator in self.simulators:
                if simulator.episode is None and self._pending:
                    self._begin(simulator)
            working = [simulator for simulator in self._busy() if not simulator.look]
            patience = self.batcher.patience(len(working)) if self.batcher else None
            ready = wait([s.connection for s in working], self.silence if patience is None else patience)
            for simulator in working:
                if simulator.connection in ready:
                    yield from self._handle(simulator)
                elif time.monotonic() - simulator.last_contact > self.silence:
                    self._replace(simulator, f"no sign of life for {self.silence:.0f} s")
            coming = sum(not simulator.look for simulator in self._busy())
            if self.batcher and self.batcher.patience(coming) == 0:
                self._answer()

    def _busy(self) -> list[Simulator]:
        return [simulator for simulator in self.simulators if simulator.episode is not None]

    def _begin(self, simulator: Simulator) -> None:
        """The first pending episode whose row of the policy's batch the fewest running episodes share; of
        these, one of the world that is there."""
        rows = self.batcher.batch if self.batcher else 1
        taken = Counter(busy.episode.index % rows for busy in self._busy())
        simulator.episode = min(
            self._pending,
            key=lambda episode: (taken[episode.index % rows], episode.world != simulator.world),
        )
        simulator.world = simulator.episode.world
        self._pending.remove(simulator.episode)
        simulator.send(simulator.episode)

    def _handle(self, simulator: Simulator) -> Iterator[Clip | EpisodeResult]:
        """Take the next message of a simulator."""
        simulator.last_contact = time.monotonic()
        try:
            message = simulator.connection.recv()
        except GONE:
            self._replace(simulator)
            return
        if isinstance(message, UserError):
            raise message
        if isinstance(message, Fault):
            raise Fault(message.trace, f"{self.noun} {simulator.episode.index}, {message.what}")
        if isinstance(message, Look):
            simulator.look = message
            row, seed = message.seed[1] % self.batcher.batch, seed_of("rollout", *message.seed)
            self.batcher.waiting.append(Question(simulator, message.observation, seed, row))
            return
        if isinstance(message, EpisodeResult):
            simulator.episode = None
        yield message

    def _answer(self) -> None:
        """Call the policy once, and send the actions."""
        picked = self.batcher.take()
        answers, sizes = self.batcher.ask(picked), (self.batcher.batch, self.actions)
        if answers.ndim != 3 or answers.shape[::2] != sizes or not answers.shape[1]:
            wanted = "the simulator takes ({}, K, {})".format(*sizes)
            raise UserError(f"the policy returned actions of shape {answers.shape}, {wanted}")
        for row, question in picked.items():
            simulator: Simulator = question.asker
            look, simulator.look = simulator.look, None
            if not np.isfinite(answers[row]).all():
                where = f"{self.noun} {look.seed[1]}, {look.task}, observation {look.seed[2]}"
                fix = "its weights or its precision are broken, try another checkpoint"
                raise UserError(f"{where}: the policy returned NaN or infinite actions; {fix}")
            simulator.send(answers[row, : self.chunk])

    def _replace(self, simulator: Simulator, reason: str = "") -> None:
        """A new process for one that died; its episode is run again from the start."""
        episode, last_line = simulator.episode, simulator.stop()
        self._deaths[episode.index] += 1
        self.simulators[self.simulators.index(simulator)] = Simulator(self.setup)
        if self._deaths[episode.index] == MOST_DEATHS:
            died = f"its simulator process died {MOST_DEATHS} times ({reason or last_line})"
            fix = f"finished {self.noun}s are kept: remove the cause and continue with resume=true"
            raise UserError(f"{self.noun} {episode.index}: {died}; {fix}")
        self._pending.insert(0, episode)
        self.replaced += 1
