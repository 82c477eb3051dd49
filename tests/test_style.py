"""What continuous integration checks besides behaviour: formatting, lint, types, how large the house is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_checks_pass(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_fit_one_sitting() -> None:
    """400 lines are long."""
    sources = [
        file
        for name in ("defi", "Step1_GFDM", "Step2_GIDM", "Step3_DeFI", "experiments")
        for file in (ROOT / name).rglob("*.py")
    ]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in sources}
    assert lengths and {name: length for name, length in lengths.items() if length > 400} == {}
