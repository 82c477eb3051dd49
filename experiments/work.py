"""Steps become folders: who takes which, commands in processes of their own, times, what is left.

<output>/steps/<key>/step.json   the command and what it took so far; `done` once it is
                     out/        what the command made
                     log.txt     what it printed
"""

import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from defi.engine.output import claim, write_file
from defi.errors import UserError
from defi.files import read_json
from experiments.plan import Step, arguments

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
    module = import_module(run)
    main = getattr(module, "main", None) or import_module(f"{run}.__main__").main
    main()


class Workshop:
    """The folder `output`/steps, and this process at work on some of it. Others may be, too."""

    def __init__(self, output: Path, steps: Mapping[str, Step]) -> None:
        self.folder, self.steps = output / "steps", steps
        self.failed: dict[str, str] = {}  # key → what is wrong
        self._fork, self._process, self._stopped = get_context("forkserver"), None, False
        self._fork.set_forkserver_preload(AHEAD)

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
            if records[key].get("done"):
                for name in (step.name, ""):  # "": of all
                    took[name] += records[key]["seconds"]
                    expected[name] += step.seconds
        pace = {name: took[name] / max(expected[name], 1e-9) for name in took}
        whole = pace.get("", 1.0)
        spent = {key: records[key].get("seconds", 0.0) for key in keys}
        left = (self.steps[k].seconds * pace.get(self.steps[k].name, whole) - spent[k] for k in spent)
        return sum(max(each, 0.0) for each in left)

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
                self._work(bar, bar.add_task("steps", total=len(self.steps), now=""), tell)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        if self._stopped:
            sys.exit(STOPPED)

    def _work(self, bar: Progress, task: Any, tell: Callable[[Step], Any]) -> None:
        done: set[str] = set()
        while not self._stopped:
            done |= {key for key in self.steps.keys() - done if self.is_done(key)}
            bar.update(task, completed=len(done))
            open_ = [step for key, step in self.steps.items() if key not in done and key not in self.failed]
            for step in open_:  # what needs one that failed
                if lost := next((each.key for each in step.inputs if each.key in self.failed), None):
                    self.failed[step.key] = f"left out: {lost} failed"
            possible = [s for s in open_ if s.key not in self.failed and {i.key for i in s.inputs} <= done]
            if not open_:
                return
            for step in possible:
                (self.folder / step.key).mkdir(parents=True, exist_ok=True)
                with suppress(UserError):  # somebody has it
                    lock = claim(self.folder / step.key)
                    break
            else:
                time.sleep(LOOK_AGAIN)
                continue
            try:
                if not self.is_done(step.key):  # since we looked
                    self._make(step, lambda text: bar.update(task, now=text), open_)
            finally:
                if lock is not None:
                    lock.close()
            if self.is_done(step.key):
                tell(step)

    def _make(self, step: Step, show: Callable[[str], None], open_: list[Step]) -> None:
        folder, known = self.folder / step.key, self.record(step.key)
        places = {each.key: str(self.place(each.key)) for each in step.inputs}
        settings = arguments(step.settings, places) + arguments(step.how, {})
        settings += [f"output={self.place(step.key)}", *again(self.place(step.key), step)]
        left, began = self.seconds_left(each.key for each in open_), time.monotonic()
        if not sys.stdout.isatty():
            print(f"{step.key}; {timedelta(seconds=round(left))} of work left", flush=True)
        record = {"name": step.name, "command": ["python", "-m", step.run, *settings]}
        record |= {"seconds": known.get("seconds", 0.0), "done": False}
        write_file(folder / RECORD, json.dumps(record, indent=1))
        with (folder / LOG).open("a") as log:
            log.write(f"\n$ {' '.join(record['command'])}\n")
        self._process = self._fork.Process(target=perform, args=(step.run, settings, str(folder / LOG)))
        self._process.start()
        if self._stopped:  # a signal before there was a process to pass it on to
            self._process.terminate()
        try:
            while self._process.is_alive():
                self._process.join(1.0)
                rest = max(left - (time.monotonic() - began), 0.0)
                show(f"{step.key}; {timedelta(seconds=round(rest))} of work left")
        finally:
            self._process.join()  # after Ctrl-C, which it has got as well
            record["seconds"] += time.monotonic() - began
            record["done"] = self._process.exitcode == 0
            write_file(folder / RECORD, json.dumps(record, indent=1))
        if not record["done"] and not self._stopped:
            lines = (folder / LOG).read_text(errors="replace").splitlines()
            why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
            self.failed[step.key] = f"exit code {self._process.exitcode}: {why} (see {folder / LOG})"

    def _stop(self, number: int, frame: Any) -> None:
        self._stopped = True
        if self._process is not None and self._process.is_alive():
            self._process.terminate()


def again(out: Path, step: Step) -> list[str]:
    """What makes a command continue what an earlier start of it left."""
    if not out.is_dir():
        return []
    trains = any(key.startswith("trainer.") for key in step.settings)
    return ["overwrite=true" if trains and not any(out.glob("checkpoints/step_*")) else "resume=true"]
