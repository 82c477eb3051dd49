"""Output folders: what is not deleted, who may write, who may read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_toy import Points, toy, trainer

from defi.engine.checkpoint import find_checkpoint
from defi.engine.loop import train
from defi.engine.output import LOCK, check_output, claim
from defi.errors import UserError

CONFIG = {"config": {"preset_name": "test"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ckpts") / "toy"
    train(toy(), Points(), trainer(max_steps=1), output=output, **CONFIG)
    return output


def test_overwrite_deletes_no_other_run(run: Path) -> None:
    """Who forgets the last part of ckpts/policy would lose every stage."""
    with pytest.raises(UserError, match="overwrite=true would delete .*toy.*, a checkpoint of another run"):
        check_output(run.parent, overwrite=True)
    assert check_output(run, overwrite=True) == run


def test_resuming_is_offered_where_it_can_be_done(run: Path) -> None:
    for resume, offered in ((None, False), (False, True)):
        with pytest.raises(UserError, match="overwrite=true replaces it") as error:
            check_output(run, resume=resume)
        assert ("resume=true" in str(error.value)) == offered


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    script = "import sys; from defi.engine.output import *; check_output(sys.argv[1], resume=True)"
    command = [sys.executable, "-c", script, str(tmp_path)]
    held = claim(tmp_path)
    assert held is not None
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode != 0 and "another process is writing there" in other.stderr
    second = os.environ | {"RANK": "1"}  # the first process of its run looks after this
    assert subprocess.run(command, capture_output=True, env=second).returncode == 0
    held.close()
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_run_lets_go_of_its_folder(run: Path) -> None:
    assert (run / LOCK).is_file()
    train(toy(), Points(), trainer(max_steps=2), output=run, resume=True, **CONFIG)


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(toy(), Points(), trainer(max_steps=1), output=tmp_path, **CONFIG)
    finally:
        os.umask(before)
    files = [path for path in find_checkpoint(tmp_path).rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    assert any(path.suffix == ".safetensors" for path in files)
