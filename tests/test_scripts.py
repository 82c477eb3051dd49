"""Every script, from the quickstart to one per job, as a user runs it: at tiny size, for a few steps."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from defi.engine.checkpoint import find_checkpoint

pytest.importorskip("pybullet")

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("trainer.max_steps=1", "trainer.save_every=1", "trainer.preview_every=0")


def run(script: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """A script in the environment that runs the tests."""
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *settings],
        env=os.environ | {"DEFI_VENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a whole smoke run leaves."""
    output = tmp_path_factory.mktemp("quickstart") / "run"
    done = run("quickstart.sh", "size=smoke", f"output={output}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "average length" in done.stdout and "report.html" in done.stdout
    return output


def test_quickstart_reports_everything(quickstart: Path) -> None:
    page = (quickstart / "report.html").read_text()
    for title in ("What ran", "Result", "Tasks", "Imagined futures", "Latent actions", "Training"):
        assert title in page
    assert page.count("data:video/mp4") >= 2
    results = json.loads((quickstart / "rollout" / "results.json").read_text())
    assert len(results["chains"]) == 2


def test_quickstart_does_nothing_twice(quickstart: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (quickstart / "ckpts").rglob("*")}
    again = run("quickstart.sh", "size=smoke", f"output={quickstart}")
    assert again.returncode == 0 and "\n── " not in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (quickstart / "ckpts").rglob("*")}


def test_quickstart_refuses_unknown_settings() -> None:
    refused = run("quickstart.sh", "size=huge")
    assert refused.returncode == 2 and "size=huge: unknown" in refused.stderr


@pytest.mark.parametrize(
    "script, settings",
    [
        ("step1_prepare.sh", ("data.root={q}/data", "vae={q}/ckpts/vae", "data.held_out=validation")),
        ("step1_train.sh", ("data.root={q}/latents", "vae={q}/ckpts/vae", *SHORT)),
        ("step1_eval.sh", ("data.root={q}/latents", "checkpoint={q}/ckpts/gfdm", "episodes=1", "steps=2")),
        ("step2_train.sh", ("data.root={q}/data", *SHORT)),
        (
            "step3_rollout.sh",
            ("checkpoint={q}/ckpts/policy", "chains=1", "length=1", "tasks=[open_drawer]", "max_steps=[10]"),
        ),
    ],
)
def test_each_job(quickstart: Path, tmp_path: Path, script: str, settings: tuple[str, ...]) -> None:
    output = tmp_path / "out"
    filled = [setting.replace("{q}", str(quickstart)) for setting in settings]
    done = run(script, *filled, f"output={output}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert any(output.iterdir())


def test_training_a_policy_with_rollouts_at_intervals(quickstart: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rollout = ("trainer.rollout_every=1", "rollout.chains=1", "rollout.length=1", "rollout.max_steps=[10]")
    done = run(
        "step3_train.sh",
        f"output={output}",
        f"data.store={quickstart}/features",
        f"gfdm_checkpoint={quickstart}/ckpts/gfdm",
        f"gidm_checkpoint={quickstart}/ckpts/gidm",
        *SHORT,
        *rollout,
        "rollout.tasks=[open_drawer]",
        "rollout.videos={chains: 1, every: 5}",
        "trainer.best_metric=average_length",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    manifest = json.loads((output / "checkpoints" / "step_00000001" / "manifest.json").read_text())
    assert manifest["metrics"] == {"average_length": 0.0, "success_1": 0.0}
    assert list((output / "rollouts" / "step_00000001").rglob("*.mp4"))


def test_a_quickstart_of_another_size_is_not_passed_off(quickstart: Path) -> None:
    refused = run("quickstart.sh", "size=short", f"output={quickstart}")
    assert refused.returncode == 2 and "holds a quickstart of size=smoke" in refused.stderr


@pytest.mark.parametrize("arguments", ["", "--cpu --num_processes 1"], ids=["plain", "launched"])
def test_a_signal_to_a_script_saves_and_leaves(quickstart: Path, tmp_path: Path, arguments: str) -> None:
    """As one to the training itself would; nothing goes on behind its back."""
    output = tmp_path / "out"
    settings = [f"data.root={quickstart}/data", f"output={output}", "trainer.max_steps=100000"]
    script = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "step2_train.sh"), *settings, "trainer.log_every=1"],
        env=os.environ
        | {"DEFI_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
        | {"ACCELERATE_ARGS": arguments},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert script.poll() is None
        time.sleep(0.1)
    script.terminate()
    code = script.wait(timeout=120)
    assert code == (1 if arguments else 75)
    assert find_checkpoint(output)
    lines = len(metrics.read_text().splitlines())
    time.sleep(1)
    assert len(metrics.read_text().splitlines()) == lines


@pytest.mark.parametrize(
    "script, settings, message",
    [
        ("step1_train.sh", ("data.root={q}/nowhere", "vae={q}/ckpts/vae"), "no annotations"),
        ("step3_rollout.sh", ("checkpoint={q}/ckpts/gfdm", "chains=1"), "gfdm"),
        ("step3_rollout.sh", ("checkpoint={q}/ckpts/policy", "chains=1", "tasks=[open_door]"), "open_door"),
    ],
)
def test_mistakes_end_in_one_line(
    quickstart: Path, tmp_path: Path, script: str, settings: tuple[str, ...], message: str
) -> None:
    output = tmp_path / "out"
    filled = [setting.replace("{q}", str(quickstart)) for setting in settings]
    failed = run(script, *filled, f"output={output}")
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode != 0 and len(errors) == 1 and message in errors[0]
    assert "Traceback" not in failed.stderr
    assert not output.exists()
