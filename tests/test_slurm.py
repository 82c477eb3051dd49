"""`scripts/slurm.sh`, with stand-ins for Slurm's commands and for Python."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "slurm.sh"

COMMANDS = {
    "bin/srun": '[ "$1 $2" = "--kill-on-bad-exit=0 --wait=60" ] && shift 2; '
    'SLURM_PROCID=1 SLURM_LOCALID=1 exec "$@"',
    "bin/scontrol": 'echo "$@" >> told; [ "$1" != show ] || echo first-node',
    "venv/bin/python": 'echo "$RANK/$WORLD_SIZE $MASTER_ADDR $@" >> told; exit "$LEAVE_WITH"',
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    for name, body in COMMANDS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    return tmp_path


def submit(cluster: Path, *arguments: str, code: int = 0) -> tuple[int, list[str]]:
    """Exit code of the job, and what the commands were told."""
    environment = {
        "PATH": f"{cluster}/bin:{os.environ['PATH']}", "DEFI_VENV": "venv", "LEAVE_WITH": str(code),
        "SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NTASKS": "2",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    told = cluster / "told"
    lines = told.read_text().splitlines() if told.exists() else []
    told.unlink(missing_ok=True)
    return done.returncode, lines


def test_a_job_runs_one_process_per_task(cluster: Path) -> None:
    code, told = submit(cluster, "Step3_DeFI.train", "output=run", "trainer.lr=1e-3")
    assert code == 0
    assert told == [
        "show hostnames n[1-2]",
        "1/2 first-node -m Step3_DeFI.train output=run trainer.lr=1e-3",
    ]


def test_a_stopped_job_queues_itself_and_goes_on(cluster: Path) -> None:
    code, told = submit(cluster, "Step3_DeFI.train", "output=run", code=75)
    assert code == 75 and told[-1] == "requeue 7"
    (cluster / "run").mkdir()
    (cluster / "run" / "config.yaml").write_text("")
    code, told = submit(cluster, "Step3_DeFI.train", "output=run")
    assert code == 0 and told[-1].endswith("output=run resume=true")


@pytest.mark.parametrize("code", [138, 143])
def test_a_signal_while_python_starts(cluster: Path, code: int) -> None:
    assert submit(cluster, "Step3_DeFI.train", "output=run", code=code)[1][-1] == "requeue 7"


def test_only_the_first_start_overwrites(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster / "run").mkdir()
    (cluster / "run" / "config.yaml").write_text("")
    given = ("Step3_DeFI.train", "overwrite=true", "output=run", "a=1")
    assert submit(cluster, *given)[1][-1].endswith("overwrite=true output=run a=1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert submit(cluster, *given)[1][-1].endswith("train output=run a=1 resume=true")


def test_a_failed_job_ends(cluster: Path) -> None:
    code, told = submit(cluster, "Step3_DeFI.train", "output=run", code=2)
    assert code == 2 and not any(line.startswith("requeue") for line in told)
    assert submit(cluster, "Step3_DeFI.train") == (2, [])
