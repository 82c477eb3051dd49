"""Several processes: two that share a batch do what one does with all of it, for every stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from engine_toy import Points, toy, trainer
from safetensors.torch import load_file
from stages import STAGES, train_stage

from defi.config import CONFIG_DIR
from defi.engine.checkpoint import find_checkpoint
from defi.engine.loop import train
from defi.engine.tracking import METRICS, read_metrics
from defi.errors import UserError

TESTS = Path(__file__).resolve().parent
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
    *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
)
LOSSES = ("loss", "mse", "codebook", "commitment", "action_loss")


def launch(script: str, *arguments: str) -> None:
    """Run a script of the tests in two processes on the CPU."""
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [*LAUNCH, str(TESTS / script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
    one, both = find_checkpoint(tmp_path), find_checkpoint(two / stage)
    files = [path.relative_to(one) for path in one.rglob("*.safetensors") if "state" not in path.parts]
    assert len(files) >= 2
    optimizer = load_file(one / "state" / "optimizer.safetensors")
    for file in files:
        found = load_file(both / file)
        for name, tensor in load_file(one / file).items():
            moved = _moved(optimizer, name, tensor)
            torch.testing.assert_close(
                found[name][moved],
                tensor[moved],
                rtol=1e-3,
                atol=1e-4,
                msg=lambda m: f"{file}: {name}: {m}",  # noqa: B023
            )
    for first, second in zip(read_metrics(tmp_path / METRICS), read_metrics(two / stage / METRICS)):
        assert (first["kind"], first["step"]) == (second["kind"], second["step"])
        for name in LOSSES:
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=1e-4), name


def _moved(optimizer: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Where a tensor has a gradient; all of a buffer.

    A bias before a normalisation has none but rounding, which Adam makes as large as any other.
    """
    for key, squares in optimizer.items():
        if key.startswith("exp_avg_sq.") and key.endswith(f".{name}"):
            return squares.sqrt() > 1e-6
    return torch.ones_like(tensor, dtype=torch.bool)


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


@pytest.mark.parametrize("name", ["single_gpu", "ddp", "multi_node"])
def test_launch_settings_are_accelerates(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = CONFIG_DIR / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    written = yaml.safe_load(file.read_text())
    assert config.num_processes == written["num_processes"]
    assert file.read_text().startswith("# ") and f"{name}.yaml" in file.read_text()


@pytest.mark.parametrize("switch", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_models_are_refused(switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, "true")
    with pytest.raises(UserError, match=f"{switch}=true: .*configs/accelerate/ddp.yaml"):
        train(toy(), Points(), trainer(), output=tmp_path, config={})
    assert not any(tmp_path.iterdir())
