"""Preparation that is killed, shared by processes, or runs into damage: nothing is lost or done twice."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import die_before
from launcher import launch
from preparations import KINDS, OBSERVATIONS, VIDEOS, contents, noted, run, write_inputs

from defi.data.calvin import frame_name
from defi.engine import output as output_folder
from defi.errors import UserError
from Step1_GFDM import prepare as step1
from Step3_DeFI import prepare as step3
from Step3_DeFI.store import DONE, PolicyStore

TESTS = Path(__file__).resolve().parent
WRITING = ((output_folder, "sync"), (os, "replace"), (np.memmap, "flush"), (Path, "unlink"))
Contents = dict[str, bytes | tuple[int, ...]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contents]:
    """What undisturbed preparations leave."""
    output = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        run(kind, inputs, output / kind)
    return {kind: contents(output / kind) for kind in KINDS}


# ------------------------------------------------------------ killed


def start(kind: str, inputs: Path, output: Path, last_act: int | None) -> None:
    """One start, as a cluster would repeat it; ends itself before its `last_act`-th act of writing."""
    die_before(last_act, WRITING)
    run(kind, inputs, output, resume=output.exists())


def finished(kind: str, output: Path) -> int:
    """Episodes or batches of rows that are done."""
    if kind == "latents":
        return len(list(output.glob("annotation/*/*.json")))
    try:
        return int(np.load(output / DONE).sum())
    except (OSError, ValueError):  # not there yet, or half-written
        return 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "kills", [6, pytest.param(40, marks=pytest.mark.slow)], ids=lambda kills: f"{kills}_kills"
)
def test_preparation_survives_being_killed(
    kind: str,
    kills: int,
    inputs: Path,
    whole: dict[str, Contents],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every second time at a random moment, otherwise before a random act of writing."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))  # for the server, which imports torch once for all starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preparations", "test_preparation"])
    chance, output = random.Random(kills), tmp_path / "killed"
    killed = most = 0
    while killed < kills:
        act = chance.randrange(24) if killed % 2 else None
        process = context.Process(target=start, args=(kind, inputs, output, act))
        before = finished(kind, output)
        process.start()
        if act is None:
            wanted = before + chance.randrange(8)
            while process.is_alive() and finished(kind, output) < wanted:
                time.sleep(0.001)
            process.join(chance.uniform(0, 0.05))
            process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before it could be killed
            assert contents(output) == whole[kind]
            shutil.rmtree(output)
            most = 0
        else:
            assert process.exitcode == -signal.SIGKILL and finished(kind, output) >= most
            killed, most = killed + 1, finished(kind, output)
    run(kind, inputs, output, resume=True)
    found = contents(output)
    assert found.keys() == whole[kind].keys()
    assert [name for name, content in whole[kind].items() if found[name] != content] == []


# ------------------------------------------------------------ two processes


def test_two_processes_lose_nothing_and_do_nothing_twice(
    inputs: Path, whole: dict[str, Contents], tmp_path: Path
) -> None:
    printed = launch("preparations.py", str(inputs), str(tmp_path))
    assert printed.count(f"{VIDEOS - 1} episodes in train; 1 left out") == 1
    assert printed.count("1 episodes in val\n") == 1
    for kind in KINDS:
        assert contents(tmp_path / kind) == whole[kind], kind
    shares = [set(json.loads((tmp_path / f"done_{rank}.json").read_text())) for rank in range(2)]
    assert not shares[0] & shares[1] and all(len(share) > 10 for share in shares)
    held_out = {"train/18", "val/18"}  # the 20th caption, counting that of the damaged video
    assert shares[0] | shares[1] == {f"train/{n:02d}" for n in range(VIDEOS)} ^ held_out | set(
        map(str, range(OBSERVATIONS))
    )


# ------------------------------------------------------------ a full disk, damage


@pytest.mark.parametrize(
    ("kind", "room"),
    [*(("latents", room) for room in (0, 3, 9, 20)), *(("store", room) for room in (0, 3, 5, 6))],
)
def test_a_full_disk_is_named_and_a_later_start_goes_on(
    kind: str,
    room: int,
    inputs: Path,
    whole: dict[str, Contents],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """After `room` files, or arrays, there is none."""
    files = iter(range(room))

    def limited(act: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **named: Any) -> Any:
            if next(files, None) is None:
                raise OSError(28, "No space left on device")
            return act(*args, **named)

        return write

    with monkeypatch.context() as patch:
        for place, name in ((step1, "write_file"), (step1, "film"), (step3, "write_file")):
            patch.setattr(place, name, limited(getattr(place, name)))
        patch.setattr(np, "save", limited(np.save))
        with pytest.raises((SystemExit, UserError)) as ended:
            run(kind, inputs, tmp_path / "out")
    said = capsys.readouterr().err if kind == "latents" else str(ended.value)
    assert f"{tmp_path / 'out'}: cannot write " in said and "No space left on device" in said
    assert "free some space, then continue with resume=true" in said
    kept = finished(kind, tmp_path / "out")
    done: list[str] = []
    with monkeypatch.context() as patch:
        for place, name in ((step1, "write_episode"), (step3.Encoder, "__call__")):
            patch.setattr(place, name, getattr(place, name))  # to be put back
        noted(done)
        run(kind, inputs, tmp_path / "out", resume=True)
    assert len(done) == (VIDEOS if kind == "latents" else OBSERVATIONS) - kept
    assert contents(tmp_path / "out") == whole[kind]


def test_a_damaged_picture_is_named_and_a_later_start_goes_on(
    inputs: Path, whole: dict[str, Contents], tmp_path: Path
) -> None:
    """Rows that are done stay; with the file mended, the others follow."""
    root, file = tmp_path / "demos", f"training/{frame_name(145)}"
    shutil.copytree(inputs / "demos", root)
    good = (root / file).read_bytes()
    place = good.index(b"rgb_static.npy") + 200
    (root / file).write_bytes(good[:place] + b"????" + good[place + 4 :])
    with pytest.raises(UserError, match=rf"{file}: cannot be read \("):
        run("store", inputs, tmp_path / "store", **{"data.root": root})
    kept = finished("store", tmp_path / "store")
    assert 0 < kept < OBSERVATIONS
    (root / file).write_bytes(good)
    run("store", inputs, tmp_path / "store", resume=True, **{"data.root": root})
    found = contents(tmp_path / "store")
    assert found["inputs.npy"] == whole["store"]["inputs.npy"] and found.keys() == whole["store"].keys()


def test_a_damaged_zip_is_named_before_any_work(inputs: Path, tmp_path: Path) -> None:
    archive = tmp_path / "demos.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(p for p in (inputs / "demos").rglob("*") if p.is_file()):
            packed.write(path, path.relative_to(inputs))
    good, frame = archive.read_bytes(), f"demos/training/{frame_name(145)}"
    start = good.index(frame.encode()) + len(frame)
    for damaged, message in (
        (
            good[: start + 900] + b"????" + good[start + 904 :],
            rf"{frame}, at byte {start} of the zip: cannot be read \(wrong checksum\)",
        ),
        (good[:-500], r"demos\.zip: cannot be read"),
        (good[: len(good) // 2], r"demos\.zip: cannot be read"),
    ):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            run("store", inputs, tmp_path / "store", **{"data.root": archive})
        assert not (tmp_path / "store").exists()
    archive.write_bytes(good)
    run("store", inputs, tmp_path / "store", **{"data.root": archive})
    assert len(PolicyStore(tmp_path / "store")) == OBSERVATIONS
