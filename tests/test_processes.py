"""Several processes: two that share a batch do what one does with all of it, for every stage."""

import atexit
import os
from pathlib import Path

import pytest
import torch
import yaml
from engine_toy import Points, toy, trainer
from failing import SomeDamaged
from launcher import launch
from safetensors.torch import load_file
from stages import STAGES, assert_same_training, train_stage

from defi.config import CONFIG_DIR
from defi.engine import checkpoint
from defi.engine.checkpoint import find_checkpoint
from defi.engine.log import METRICS, read_metrics
from defi.engine.loop import train
from defi.processes import LONGEST, print_once, processes

CONFIG = {"preset_name": "test"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all stages in two processes."""
    output = tmp_path_factory.mktemp("two")
    launch("stages.py", str(output))
    return output


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(stage: str, two: Path, tmp_path: Path) -> None:
    """Losses, weights, averages; for the latent actions, how often codes were used and restarted, too."""
    train_stage(stage, tmp_path, steps=3)
    assert_same_training(tmp_path, two / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_equal_the_whole_batch(stage: str, tmp_path: Path) -> None:
    train_stage(stage, tmp_path / "whole", steps=3)
    train_stage(stage, tmp_path / "parts", steps=3, micro_batch=1)
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_a_run_goes_on_with_another_number_of_processes(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Three steps of two processes, then three of one: the same samples in every step."""
    run = two / "toy"
    settings = {"config": {"preset_name": "test"}}
    train(toy(dropout=0.0), Points(), trainer(max_steps=6), resume=True, output=run, **settings)
    assert "processes: 2 → 1; same samples, other dropout" in capsys.readouterr().out
    train(toy(dropout=0.0), Points(), trainer(max_steps=6), output=tmp_path / "whole", **settings)
    found, expected = (load_file(find_checkpoint(r) / "model.safetensors") for r in (run, tmp_path / "whole"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


FAILURES = {
    "start": "error: data: no training samples",
    "data": "error: data: [Errno 2] No such file or directory: '/data/five.npz'; restore it",
    "preview": "error: preview: the main process has no pictures",
    "folder": "error: run: cannot be written to; choose another output=",
}


@pytest.mark.parametrize("how", FAILURES)
def test_one_process_that_fails_ends_the_run(how: str, tmp_path: Path) -> None:
    """Within a minute, with its message; nothing that was saved before is lost."""
    printed = launch("failing.py", str(tmp_path / "run"), how, code=1, seconds=60)
    assert printed.count(FAILURES[how]) == 1
    assert "[rank" not in printed, "a traceback of the other process"
    if how in ("start", "folder"):
        assert not (tmp_path / "run").exists()
        return
    assert checkpoint.list_checkpoints(tmp_path / "run")
    for run, resume in ((tmp_path / "run", True), (tmp_path / "whole", False)):
        train(toy(dropout=0.0), Points(), trainer(max_steps=5), output=run, resume=resume, config=CONFIG)
    found, expected = (
        load_file(find_checkpoint(tmp_path / r) / "model.safetensors") for r in ("run", "whole")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_replaced_samples_of_all_processes_are_told(tmp_path: Path) -> None:
    launch("failing.py", str(tmp_path / "two"), "replaced")
    settings = trainer(max_steps=11, bad_samples=0.6, log_every=4)
    train(toy(dropout=0.0), SomeDamaged(), settings, output=tmp_path / "one", config=CONFIG)
    one, two = (
        sorted(r["reason"] for r in read_metrics(tmp_path / run / METRICS) if r["kind"] == "bad_sample")
        for run in ("one", "two")
    )
    assert one == two and len(set(one)) == 4


@pytest.mark.parametrize("name", ["single_gpu", "ddp", "multi_node", "fsdp"])
def test_launch_settings_are_accelerates(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = CONFIG_DIR / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    written = yaml.safe_load(file.read_text())
    assert config.num_processes == written["num_processes"]
    assert file.read_text().startswith("# ") and f"{name}.yaml" in file.read_text()


def test_a_line_before_training_does_not_join_the_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Who joins them first decides how long they wait."""
    joined: list[dict] = []
    monkeypatch.setattr("defi.processes.PartialState", lambda **settings: joined.append(settings))
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        print_once(f"from {rank}")
    assert (capsys.readouterr().out, joined) == ("from 0\n", [])
    processes()
    assert joined == [{"cpu": not torch.cuda.is_available(), "timeout": LONGEST}]


def test_processes_asked_for_in_a_loop_leave_nothing_more_to_do_at_the_end() -> None:
    """The wait for Gloo's threads is once per process: preparation asks with every batch."""
    before = atexit._ncallbacks()
    for _ in range(3):
        processes()
    assert atexit._ncallbacks() == before


def test_other_commands_leave_out_the_launchers_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(
        "defi.processes.PartialState", lambda **_: seen.append(os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    )
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    processes()
    assert seen == ["false"] and os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
