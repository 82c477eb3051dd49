"""Runs that are killed at any moment, while they write among others, and resumed until they are done."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from engine_toy import Points, Toy, toy, trainer
from killing import die_before
from safetensors.torch import load_file

from defi.engine import checkpoint
from defi.engine.checkpoint import find_checkpoint, list_checkpoints, read_manifest
from defi.engine.log import METRICS, read_metrics
from defi.engine.loop import train

TESTS = Path(__file__).resolve().parent
BEST = 15  # the step whose evaluation is the best
WRITING = ((checkpoint, "sync"), (os, "replace"), (shutil, "rmtree"))  # what a checkpoint goes through


def evaluate(model: Toy, step: int, folder: Path) -> dict[str, float]:
    return {"success": 1 / (1 + abs(step - BEST))}


def run_toy(output: Path, steps: int) -> None:
    """One start of the run, as a cluster would repeat it."""
    settings = trainer(max_steps=steps, save_every=1, keep=2, rollout_every=5, best_metric="success")
    train(
        toy(),
        Points(),
        settings,
        output=output,
        config={"preset_name": "toy"},
        evaluate=evaluate,
        resume=(output / checkpoint.RUN_CONFIG).exists(),
    )


def start(output: Path, steps: int, last_act: int | None) -> None:
    """As `run_toy`, in a process that kills itself before its `last_act`-th act of writing."""
    die_before(last_act, WRITING)
    run_toy(output, steps)


@pytest.mark.parametrize(
    "kills", [6, pytest.param(60, marks=pytest.mark.slow)], ids=lambda kills: f"{kills}_kills"
)
def test_a_run_survives_being_killed(kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second time at a random moment, otherwise before a random act of writing a checkpoint."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))  # for the server, which imports torch once for all starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine_toy", "test_engine_kill"])
    chance, output, steps = random.Random(kills), tmp_path / "killed", 12 * kills
    killed = torn = newest = 0
    while killed < kills:
        act = chance.randrange(60) if killed % 2 else None
        process = context.Process(target=start, args=(output, steps, act))
        before = _lines(output)
        process.start()
        if act is None:
            wanted = before + chance.randrange(4)
            while process.is_alive() and _lines(output) < wanted:
                time.sleep(0.001)
            process.join(chance.uniform(0, 0.03))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended by itself"
        killed += 1
        torn += any((output / "checkpoints").glob(".*"))
        complete = list_checkpoints(output)
        for folder in complete[-2:]:
            Toy.from_pretrained(folder)
        if complete:
            now = read_manifest(complete[-1])["step"]
            assert now >= newest, "the newest checkpoint was lost"
            newest = now
    assert torn > 0, "no kill fell into the writing of a checkpoint"

    run_toy(output, steps)
    run_toy(tmp_path / "whole", steps)
    for name in ("model.safetensors", "ema/model.safetensors", "state/optimizer.safetensors"):
        expected = load_file(find_checkpoint(tmp_path / "whole") / name)
        found = load_file(find_checkpoint(output) / name)
        assert all(found[key].equal(tensor) for key, tensor in expected.items()), name
    assert [folder.name for folder in sorted((output / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (BEST, steps - 1, steps)
    ]
    assert read_manifest(output / "checkpoints" / f"step_{BEST:08d}")["metrics"] == {"success": 1.0}
    losses = [
        [record["loss"] for record in read_metrics(run / METRICS) if record["kind"] == "train"]
        for run in (tmp_path / "whole", output)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == steps


def _lines(output: Path) -> int:
    file = output / METRICS
    return file.read_bytes().count(b"\n") if file.exists() else 0
