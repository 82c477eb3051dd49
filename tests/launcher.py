"""`accelerate launch` of a script of the tests in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
)
WHOLE = ("--multi_gpu",)  # every process holds a whole model
SHARDED = ("--use_fsdp", "--fsdp_version=2", "--fsdp_reshard_after_forward=true")


def launch(
    script: str, *arguments: str, how: tuple[str, ...] = WHOLE, code: int = 0, seconds: float = 600
) -> str:
    """Run the script; returns what it printed. It must end in time with this exit code."""
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(TESTS.parent)
    done = subprocess.run(
        [*LAUNCH, *how, str(TESTS / script), *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == code, done.stdout
    return done.stdout
