"""The doctor: right about what is there, clear about what is not."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from policy_fakes import write_stages
from rich.console import Console

from defi import doctor
from defi.engine.checkpoint import CHANGED, find_checkpoint
from defi.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    write_stages(folder)
    return find_checkpoint(folder / "gidm")


def test_this_environment_is_in_order(tmp_path: Path) -> None:
    found = [*doctor.check_python(), *doctor.check_torch(), *doctor.check_machine(tmp_path / "not" / "yet")]
    assert {finding.verdict for finding in found} <= {"ok", "note"}
    assert {"Python", "packages", "PyTorch", "machine", "disk"} <= {finding.what for finding in found}


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=999", "no-such-package", "numpy", "wandb>=0.20; extra == 'track'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: needs)
    packages = list(doctor.examine("packages", doctor.check_python))[1]
    assert packages.verdict == "wrong" and packages.fix == "run scripts/setup.sh"
    assert "torch" in packages.detail and "(needs >=999)" in packages.detail
    assert "no-such-package missing" in packages.detail
    assert "numpy" not in packages.detail and "wandb" not in packages.detail


def test_errors_become_findings() -> None:
    def check():
        yield doctor.Finding("a", "fine")
        raise UserError("clone: empty; fill it")

    fine, wrong = doctor.examine("b", check)
    assert (fine.what, wrong.what, wrong.verdict) == ("a", "b", "wrong")
    assert (wrong.detail, wrong.fix) == ("clone: empty", "fill it")


def test_a_checkpoint_is_compared_with_this_environment(checkpoint: Path, tmp_path: Path) -> None:
    (same,) = doctor.check_checkpoint(str(checkpoint))
    assert same.verdict == "ok" and "gidm" in same.detail
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["packages"]["torch"] = "0.1"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    _, other = doctor.check_checkpoint(str(copy))
    assert (other.what, other.verdict) == ("packages torch", "note") and "made with 0.1" in other.detail
    assert other.fix == "results may differ; pip install torch==0.1 has the same"
    (copy / "config.json").unlink()
    (damaged,) = doctor.examine("checkpoint", doctor.check_checkpoint, str(copy))
    assert damaged.verdict == "wrong" and "damaged" in damaged.detail


@pytest.mark.parametrize(
    ("name", "old", "told"),
    [
        ("git_commit", "abc+changes", "git checkout abc has the same"),
        ("git_commit", None, "other code may compute something else"),
        ("version", "0.0.1", "other code"),
        ("hardware device", "NVIDIA H200", "not bit for bit"),
        ("packages python", "3.10.1", "Python 3.10.1"),
        ("packages numpy", "1.26.0", "random choices may differ; pip install numpy==1.26.0"),
    ],
)
def test_what_a_difference_means(name: str, old: str | None, told: str) -> None:
    assert told in doctor.meaning(name, old)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"preset": None}, "lacks preset; copy the checkpoint again"),
        ({"version": {"a": 1}}, "made with 1, here it is None"),
        ({"packages": "[/]"}, "made with [/], here it is None"),
        ({"preset": "[/bold]"}, "preset [/bold], step"),
        ({"packages": {"torch": "1; rm *"}}, "pip install 'torch==1; rm *' has the same"),
        ({"git_commit": "x; rm *"}, "git checkout 'x; rm *' has the same"),
        ({"hardware": {"[/]": {"[/bold]": 1}}}, "made with 1, here it is None"),
    ],
)
def test_a_strangers_manifest_is_told_as_it_is(
    checkpoint: Path, tmp_path: Path, change: dict, told: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    manifest = json.loads((copy / "manifest.json").read_text()) | change
    (copy / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
    found = list(doctor.examine("checkpoint", doctor.check_checkpoint, str(copy)))
    console = Console(width=10_000, file=io.StringIO())
    console.print(doctor.report(found))
    printed = "; ".join(f"{finding.detail}; {finding.fix}" for finding in found)
    assert told in printed and all(finding.detail in console.file.getvalue() for finding in found)


def test_a_manifest_names_code_config_data_packages_and_hardware(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["version"] and {"torch", "numpy", "python"} <= manifest["packages"].keys()
    assert manifest["git_commit"] is None or len(manifest["git_commit"].removesuffix(CHANGED)) == 40
    assert manifest["hardware"]["device"]
    assert "config.yaml" in manifest["files"] and manifest["preset"] == "test"


def test_an_incomplete_clone_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "calvin_env").mkdir()
    (finding,) = doctor.examine("CALVIN", doctor.check_clone, str(tmp_path))
    assert finding.verdict == "wrong" and "git submodule update" in finding.fix


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "defi.doctor", "checkpoint=nowhere", f"output={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 1, done.stderr
    assert "nowhere: no checkpoint here" in done.stdout and "wrong" in done.stdout
    assert done.stdout.splitlines()[1].startswith("Python")
