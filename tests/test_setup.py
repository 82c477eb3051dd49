"""`scripts/setup.sh` and what the quickstart fetches, with stand-ins for Python, Git and the driver."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("scripts/setup.sh", "scripts/quickstart.sh", "requirements.txt", "pyproject.toml")
COMMANDS = {
    "venv/bin/activate": "PATH=$PWD/venv/bin:$PATH",
    "venv/bin/python": """
echo "$*" >> told
case $* in
    *"[simpler]"*) [ ! -e offline ] ;;
    *"import sapien"*) [ -e sapien ] ;;
    *drawing*)
        [ -n "${DRIVER:-}" ] && [ -e draws ] && exit
        echo "defi.errors.UserError: no driver" >&2
        exit 1
        ;;
    *sched_getaffinity*) echo 1 ;;
esac""",
    "scripts/vulkan_cpu.sh": "echo vulkan >> told; echo export DRIVER=here",
    "bin/uname": "echo Linux x86_64",
    "bin/git": """
echo "git $*" >> told
case $* in
    clone*) mkdir -p "${@: -1}" ;;
    *submodule*) [ ! -e offline ] && touch "$2/models" ;;
esac""",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in COPIED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, body in COMMANDS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    return tmp_path


def bash(project: Path, *line: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run in the project; also what the stand-ins were told meanwhile."""
    changes = {"PATH": f"{project}/bin:{os.environ['PATH']}", "DEFI_VENV": "venv", "PYTHON": sys.executable}
    environment = {key: value for key, value in os.environ.items() if key != "DRIVER"} | changes
    (project / "told").write_text("")
    done = subprocess.run(
        ["bash", *line], cwd=project, env=environment, capture_output=True, text=True, timeout=60
    )
    return done, (project / "told").read_text()


def test_simpler_s_simulator_is_tried_again_alone(project: Path) -> None:
    (project / "offline").touch()
    done, told = bash(project, "scripts/setup.sh")
    assert done.returncode == 0 and "could not be installed; all else works" in done.stdout
    assert told.count("pip install") == 2
    done, told = bash(project, "scripts/setup.sh")
    assert done.returncode == 0 and told.count("pip install") == 1 and ".[simpler]" in told
    (project / "offline").unlink()
    assert "could not" not in bash(project, "scripts/setup.sh")[0].stdout
    assert bash(project, "scripts/setup.sh")[1] == "", "nothing is left to do"


def test_drawing_for_simpler_is_tried_and_the_reason_said(project: Path) -> None:
    bash(project, "scripts/setup.sh")
    can = ("-c", ". scripts/setup.sh; can_draw_simpler")
    done, told = bash(project, *can)
    assert done.returncode == 1 and done.stderr.startswith("SAPIEN is not installed") and "vulkan" not in told
    (project / "sapien").touch()
    done, told = bash(project, *can)
    assert (done.returncode, done.stderr) == (1, "no driver\n"), "after the driver was set up"
    assert told.count("drawing()") == 2 and told.count("vulkan") == 1
    (project / "draws").touch()
    done, _ = bash(project, *can)
    assert (done.returncode, done.stderr) == (0, "")


def test_quickstart_fetches_simpler_s_assets_whole_or_not_at_all(project: Path) -> None:
    clone, quickstart = (
        project / "data" / "SimplerEnv",
        ("scripts/quickstart.sh", "world=simpler", "size=smoke"),
    )
    done, told = bash(project, *quickstart, "simpler_root=data/Simpler")
    assert done.returncode == 2 and "git" not in told and not (project / "outputs").exists()
    assert "error: simpler_root=data/Simpler: no such folder" in done.stderr
    assert "git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv" in done.stderr
    (project / "offline").touch()
    done, _ = bash(project, *quickstart)
    assert done.returncode != 0 and not clone.exists(), "half a clone is no clone"
    (project / "offline").unlink()
    done, told = bash(project, *quickstart)
    assert (clone / "models").exists() and not clone.with_name("SimplerEnv.part").exists()
    assert "checkout --quiet 4ab7178" in told and "submodule" in told
    assert "SAPIEN is not installed" in done.stderr and done.returncode == 1
    assert "git" not in bash(project, *quickstart)[1]
