"""Steps become folders: who takes which, commands in processes of their own, times, what is left.

<output>/steps/<key>/step.json   the command and what it took so far; `done` once it is
                     out/        what the command made
                     log.txt     what it printed
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from defi.engine.checkpoint import environment
from defi.engine.output import claim, write_file
from defi.errors import UserError
from defi.files import read_json
from experiments.plan import Step, arguments, entry_point

RECORD, OUT, LOG = "step.json", "out", "log.txt"
STOPPED = 75  # of a command that a signal ended: the same one continues
LOOK_AGAIN = 2.0  # seconds between looks at what other processes have finished
# Imported once, by the server that the commands' processes are forked from: else each takes seconds to start.
AHEAD = ["defi.sim.collect", "Step1_GFDM.prepare", "Step1_GFDM.train", "Step2_GIDM.train"]
AHEAD += ["Step3_DeFI.prepare", "Step3_DeFI.train", "Step3_DeFI.rollout.evaluate"]


def perform(run: str, settings: list[str], log: str) -> None:
    """`python -m <run> <settings>` as this process, which ends when the one that started it is killed."""
    killed = parent_process().sentinel
    threading.Thread(target=lambda: wait([killed]) and os._exit(1), daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [run, *settings]
    entry_point(run)()


class Workshop:
    """The folder `output`/steps, and this process at work on some of it. Others may be, too.

    failed: what is wrong with steps that this process could not do, by key.
    """

    def __init__(self, output: Path, steps: Mapping[str, Step]) -> None:
        self.folder, self.steps, self.failed = output / "steps", steps, dict[str, str]()
        self._fork = get_context("forkserver")
        self._fork.set_forkserver_preload(AHEAD)
        self._process: BaseProcess | None = None
        self._stopped = False

    def place(self, key: str) -> Path:
        """Where the output of a step is."""
        return self.folder / key / OUT

    def record(self, key: str) -> dict[str, Any]:
        """What is known of a step: {} before anybody has begun it."""
        file = self.folder / key / RECORD
        return read_json(file, "delete its folder, so that it is made again") if file.is_file() else {}

    def is_done(self, key: str) -> bool:
        return bool(self.record(key).get("done"))

    def seconds_left(self, keys: Iterable[str]) -> float:
        """What these steps will take: as expected, times what steps of the same name took of that here."""
        took, expected = defaultdict[str, float](float), defaultdict[str, float](float)
        records = {key: self.record(key) for key in self.steps}
        for key, step in self.steps.items():
            for name in (step.name, "all") if records[key].get("done") else ():
                took[name] += records[key]["seconds"]
                expected[name] += step.seconds
        pace = {name: took[name] / expected[name] for name in took}
        left = 0.0
        for key in keys:
            step = self.steps[key]
            whole = step.seconds * pace.get(step.name, pace.get("all", 1.0))
            left += max(whole - records[key].get("seconds", 0.0), 0.0)
        return left

    def work(self, tell: Callable[[Step], Any]) -> None:
        """Take steps, as they become possible and nobody else has them, until all are done or have failed.

        tell: called after each step that this process has done.

        Raises:
            SystemExit: with `STOPPED`, after a signal (SIGTERM, SIGUSR1) and what the command had to save.
        """
        before = {each: signal.signal(each, self._stop) for each in (signal.SIGTERM, signal.SIGUSR1)}
        console = Console(highlight=False, soft_wrap=True)
        columns = ("{task.description}", BarColumn(bar_width=20), MofNCompleteColumn(), "{task.fields[now]}")
        try:
            with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
                task = bar.add_task("steps", total=len(self.steps), now="")
                while not self._stopped and (open_ := self.left()):
                    bar.update(task, completed=len(self.steps) - len(open_) - len(self.failed))
                    if (step := self._take(open_, partial(bar.update, task))) is None:
                        time.sleep(LOOK_AGAIN)
                    elif self.is_done(step.key):
                        tell(step)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        if self._stopped:
            sys.exit(STOPPED)

    def left(self) -> dict[str, Step]:
        """What is still to be done: the last steps, and what those need that are not done.

        What failed is left out, and fails what needs it.
        """
        needed, inner = set[str](), {each.key for step in self.steps.values() for each in step.inputs}
        ways = [step for key, step in self.steps.items() if key not in inner]
        while ways:
            step = ways.pop()
            if step.key not in needed and not self.is_done(step.key):
                needed.add(step.key)
                ways += step.inputs
        for key, step in self.steps.items():
            if key in needed and (lost := [each.key for each in step.inputs if each.key in self.failed]):
                self.failed[key] = f"left out: {lost[0]} failed"
        return {k: step for k, step in self.steps.items() if k in needed and k not in self.failed}

    def _take(self, open_: Mapping[str, Step], show: Callable[..., None]) -> Step | None:
        """Do the first step that is possible and nobody has; None: there is none now."""
        for key, step in open_.items():
            if any(each.key in open_ for each in step.inputs):
                continue
            (self.folder / key).mkdir(parents=True, exist_ok=True)
            try:
                lock = claim(self.folder / key)
            except UserError:  # somebody has it
                continue
            with lock or nullcontext():  # of a file system without locks
                if not self.is_done(key):  # since we looked
                    self._make(step, self.seconds_left(open_), show)
            return step
        return None

    def _make(self, step: Step, left: float, show: Callable[..., None]) -> None:
        """Run the step's command. left: expected seconds of all work."""
        folder, known, out = self.folder / step.key, self.record(step.key), self.place(step.key)
        settings = arguments(step.settings, {each.key: str(self.place(each.key)) for each in step.inputs})
        settings += [*arguments(step.how, {}), f"output={out}", *again(out, step)]
        command = shlex.join(["python", "-m", step.run, *settings])

        def note(seconds: float, done: bool) -> None:
            record = {"name": step.name, "command": command, "seconds": known.get("seconds", 0.0) + seconds}
            record["made_by"] = sorted({*known.get("made_by", ()), *code()})
            write_file(folder / RECORD, json.dumps(record | {"done": done}, indent=1))

        note(0.0, False)
        with (folder / LOG).open("a") as log:
            log.write(f"\n$ {command}\n")
        if not sys.stdout.isatty():
            print(f"{step.key}; {timedelta(seconds=round(left))} of work left", flush=True)
        began = time.monotonic()
        process = self._fork.Process(target=perform, args=(step.run, settings, str(folder / LOG)))
        process.start()
        self._process = process
        if self._stopped:  # by a signal before there was a process to pass it on to
            process.terminate()
        try:
            while process.is_alive():
                process.join(1.0)
                rest = timedelta(seconds=round(max(left - (time.monotonic() - began), 0.0)))
                show(now=f"{step.key}; {rest} of work left")
        finally:
            process.join()  # after Ctrl-C, which it has got as well
            note(time.monotonic() - began, process.exitcode == 0)
        if process.exitcode and not self._stopped:
            lines = (folder / LOG).read_text(errors="replace").splitlines()
            why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
            self.failed[step.key] = f"exit code {process.exitcode}: {why} (see {folder / LOG})"

    def _stop(self, number: int, frame: Any) -> None:
        self._stopped = True
        if self._process is not None and self._process.is_alive():
            self._process.terminate()


def code() -> list[str]:
    """What this process makes steps with: this package, its commit where there is one, others' packages."""
    known = environment()
    packages = {"defi": known["version"], "commit": known["git_commit"], **known["packages"]}
    return [f"{name} {version}" for name, version in packages.items()]


def again(out: Path, step: Step) -> list[str]:
    """What makes a command continue what an earlier start of it left."""
    if not out.is_dir():
        return []
    trains = any(key.startswith("trainer.") for key in step.settings)
    return ["overwrite=true" if trains and not any(out.glob("checkpoints/step_*")) else "resume=true"]
