"""Exact resume: N+M steps equal N steps, stop, M steps, bit for bit."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_toy import Points, Toy, ToyConfig, toy, trainer
from safetensors.torch import load_file

from defi.engine import checkpoint, loop, run, state
from defi.engine.faults import EXIT_PREEMPTED, SIGNALS
from defi.engine.log import read_metrics
from defi.engine.loop import train
from defi.errors import UserError

CONFIG = {"preset_name": "toy"}
TIMES = ("samples_per_s", "data_wait", "elapsed_s")


def assert_equal_runs(a: Path, b: Path) -> None:
    first, second = checkpoint.find_checkpoint(a), checkpoint.find_checkpoint(b)
    assert first.name == second.name
    for name in ("model.safetensors", "ema/model.safetensors", "state/optimizer.safetensors"):
        tensors = load_file(first / name)
        assert tensors.keys() == load_file(second / name).keys()
        for key, tensor in load_file(second / name).items():
            assert torch.equal(tensor, tensors[key]), key
    assert (first / "state" / "rng.json").read_text() == (second / "state" / "rng.json").read_text()

    def numbers(run: Path) -> list[dict]:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run / "metrics.jsonl")]

    assert numbers(a) == numbers(b)


@pytest.mark.parametrize("workers, number", [(0, signal.SIGINT), (2, signal.SIGINT), (2, signal.SIGTERM)])
def test_resume_is_exact_in_the_middle_of_an_epoch(tmp_path: Path, workers: int, number: int) -> None:
    """With dropout, jitter, averages, accumulation, a changing rate, and a signal to all that runs."""
    settings = {"max_steps": 14, "schedule": "tri_stage", "micro_batch": 2, "phases": (0.2, 0.3, 0.5)}
    train(toy(), Points(), trainer(**settings), output=tmp_path / "whole", config=CONFIG)

    handlers = [signal.getsignal(each) for each in SIGNALS]

    def interrupt(model: object, step: int, folder: Path) -> dict[str, float]:
        for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
            os.kill(process.pid, number)
        return {}

    parts = {"output": tmp_path / "parts", "config": CONFIG}
    with pytest.raises(SystemExit) as stopped:
        train(
            toy(),
            Points(),
            trainer(**settings, rollout_every=8, workers=workers),
            evaluate=interrupt,
            **parts,
        )
    assert stopped.value.code == EXIT_PREEMPTED
    assert checkpoint.read_manifest(tmp_path / "parts")["step"] == 8
    assert handlers == [signal.getsignal(each) for each in SIGNALS]
    metrics = tmp_path / "parts" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"evaluate"' not in line) + '{"kind": "tra')
    torch.manual_seed(123)  # whatever happened in between
    train(toy(), Points(), trainer(**settings, workers=workers), resume=True, **parts)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_at_start_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """While the weights are loaded, say: after the first step the run saves and leaves."""
    run = loop.Run

    def opened(*args: object, **settings: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return run(*args, **settings)

    monkeypatch.setattr(loop, "Run", opened)
    with pytest.raises(SystemExit) as left:
        train(toy(), Points(), trainer(), output=tmp_path, config=CONFIG)
    assert left.value.code == EXIT_PREEMPTED and checkpoint.read_manifest(tmp_path)["step"] == 1
    assert capsys.readouterr().err.startswith("SIGTERM received: saving after this step, then exiting.")


@pytest.mark.parametrize(
    "change", [{"samples": -5}, {"step": -3}, {"ema_updates": -1}, {"spikes": {"steps": -1}}]
)
def test_progress_below_zero_is_told(change: dict, tmp_path: Path) -> None:
    train(toy(), Points(), trainer(max_steps=1), output=tmp_path, config=CONFIG)
    file = checkpoint.find_checkpoint(tmp_path) / "state" / "progress.json"
    content = json.dumps(json.loads(file.read_text()) | change)
    file.write_text(content)
    with pytest.raises(UserError, match=r"progress\.json: counts below zero"):
        state.read_progress(file.parents[1])


def test_generators_are_tried_on_the_device_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has one, the question for a GPU's generator would start CUDA on the first."""
    train(toy(), Points(), trainer(max_steps=1), output=tmp_path, config=CONFIG)
    started, join, read = [], run.join_training, run.read_progress

    def first_started(folder: Path) -> tuple:
        assert started
        return read(folder)

    monkeypatch.setattr(run, "join_training", lambda *args: started.append(1) or join(*args))
    monkeypatch.setattr(run, "read_progress", first_started)
    train(toy(), Points(), trainer(max_steps=2), output=tmp_path, config=CONFIG, resume=True)


def test_resume_goes_back_to_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    train(toy(), Points(), trainer(), output=tmp_path / "whole", config=CONFIG)
    run = tmp_path / "parts"
    train(toy(), Points(), trainer(max_steps=8, save_every=4), output=run, config=CONFIG)
    (run / "checkpoints" / "step_00000008" / "state" / "optimizer.safetensors").write_bytes(b"torn")
    half = run / "checkpoints" / ".writing_step_00000009"
    half.mkdir()
    (half / "manifest.json").write_text('{"files": {}}')
    train(toy(), Points(), trainer(), output=run, config=CONFIG, resume=True)
    assert_equal_runs(tmp_path / "whole", run)
    assert not half.exists()


class DrawsEverywhere(Toy):
    """Augments with the global generators of Python, NumPy and torch."""

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        scale = random.uniform(0.5, 1.5) * np.random.uniform(0.5, 1.5) + np.random.normal() * torch.rand(())
        return super().forward(batch | {"x": batch["x"] * scale})


def test_a_model_may_draw_from_any_global_generator(tmp_path: Path) -> None:
    def build() -> DrawsEverywhere:
        torch.manual_seed(0)
        return DrawsEverywhere(ToyConfig())

    def look(*args: object) -> dict[str, float]:
        random.random(), np.random.rand(), torch.rand(())  # which disturbs nothing
        return {}

    settings = {"preview_every": 2, "micro_batch": 2}
    whole = {"output": tmp_path / "whole", "config": CONFIG, "preview": lambda *_: {}}
    train(build(), Points(), trainer(**settings), **whole)
    parts = {"output": tmp_path / "parts", "config": CONFIG, "preview": look}
    train(build(), Points(), trainer(**settings, max_steps=5), **parts)
    train(build(), Points(), trainer(**settings), **parts, resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_resume_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(toy(), Points(), trainer(max_steps=2), output=tmp_path, config={"trainer": {"lr": 0.01}})
    train(
        toy(),
        Points(),
        trainer(max_steps=4, lr=0.02),
        output=tmp_path,
        config={"trainer": {"lr": 0.02}},
        resume=True,
    )
    assert "trainer.lr: 0.01 → 0.02" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    train(toy(), Points(), trainer(max_steps=2), output=tmp_path, config=CONFIG)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"net\.0\.weight has shape"):
        train(toy(width=9), Points(), trainer(), output=tmp_path, config={"new": 1}, resume=True)
    weights_only = tmp_path / "weights"
    checkpoint.save(toy(), weights_only, step=1, config=CONFIG)
    with pytest.raises(UserError, match="no training state"):
        train(toy(), Points(), trainer(), output=weights_only, config=CONFIG, resume=True)
    assert all(path.read_bytes() == content for path, content in before.items())
