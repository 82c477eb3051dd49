"""Evaluation that is killed or shared by processes: the same results, nothing lost or done twice."""

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from evaluations import CHAINS, COMMANDS, SCRIPT, outcome, run, write_inputs
from killing import die_before
from launcher import launch

from defi.engine import output as output_folder
from Step3_DeFI.rollout.results import EpisodeLog

pytest.importorskip("pybullet", reason="the simulation needs pybullet")

TESTS = Path(__file__).resolve().parent
WRITING = ((output_folder, "sync"), (os, "replace"), (EpisodeLog, "append"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def outputs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of undisturbed commands."""
    output = tmp_path_factory.mktemp("whole")
    for kind in COMMANDS:
        run(kind, inputs, output / kind)
    return output


@pytest.fixture(scope="module")
def whole(outputs: Path) -> dict[str, Any]:
    """What undisturbed commands say."""
    return {kind: outcome(kind, outputs / kind) for kind in COMMANDS}


def start(kind: str, inputs: Path, output: Path, last_act: int | None) -> None:
    """One start; ends itself before its `last_act`-th act of writing."""
    die_before(last_act, WRITING)
    run(kind, inputs, output)


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize(
    "kills", [2, pytest.param(30, marks=pytest.mark.slow)], ids=lambda kills: f"{kills}_kills"
)
def test_an_evaluation_survives_being_killed(
    kind: str,
    kills: int,
    inputs: Path,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every second time at a random moment, otherwise before a random act of writing."""
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluations", "test_evaluation"])
    chance, output, killed = random.Random(kills), tmp_path / "killed", 0
    while killed < kills:
        act = chance.randrange(8) if killed % 2 else None
        process = context.Process(target=start, args=(kind, inputs, output, act))
        process.start()
        if act is None:
            process.join(chance.uniform(0, 3))
            process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before it could be killed
            assert outcome(kind, output) == whole[kind]
            shutil.rmtree(output)
            killed += act is None  # or it would never end where all moments come too late
        else:
            assert process.exitcode == -signal.SIGKILL
            killed += 1
    run(kind, inputs, output)
    assert outcome(kind, output) == whole[kind]


def test_two_processes_lose_nothing_and_do_nothing_twice(
    inputs: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    printed = launch("evaluations.py", str(inputs), str(tmp_path))
    for kind in COMMANDS:
        assert outcome(kind, tmp_path / kind) == whole[kind], kind
    logs = [(tmp_path / "rollout" / f"chains{part}.jsonl").read_text() for part in ("", ".1")]
    assert [log.count("\n") for log in logs] == [CHAINS // 2, CHAINS // 2]
    assert printed.count("codes.npz: ") == 1


def test_an_instruction_is_shown_as_it_is_written(outputs: Path) -> None:
    gallery = (outputs / "imagined" / "gallery.html").read_text()
    assert SCRIPT not in gallery and "&lt;script&gt;alert(1)" in gallery
