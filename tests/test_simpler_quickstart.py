"""The quickstart on SIMPLER, as a user runs it: from no data to a page, at smoke size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from defi.benchmarks.simpler.check import drawing
from defi.errors import UserError

pytest.importorskip("sapien", reason="SAPIEN 3 is not installed: pip install .[simpler]")
ROOT = Path(__file__).resolve().parents[1]


def test_quickstart_simpler_goes_from_no_data_to_the_official_starts(reference: Path, tmp_path: Path) -> None:
    assets = reference / "simpler_root"
    if not assets.is_dir():
        pytest.skip(f"no assets at {assets}")
    try:
        drawing()
    except UserError as error:
        pytest.skip(str(error))
    output = tmp_path / "run"
    settings = ["world=simpler", "size=smoke", f"simpler_root={assets}", f"output={output}"]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), *settings],
        env=os.environ | {"DEFI_VENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((output / "rollout" / "results.json").read_text())
    assert [each["task"] for each in results["episodes"]].count("widowx_put_eggplant_in_basket") == 1
    assert "robot_differs" not in results["policy"], "the data are not of the benchmark's robot"
    page = (output / "report.html").read_text()
    assert all(title in page for title in ("What ran", "Result", "Imagined futures", "Latent actions"))
