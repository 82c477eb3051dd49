"""Damaged and hostile files through every reader: a clear error or an answer.

Never a crash, a hang, gigabytes of memory, or code run. 2,400 files with --slow, some 150 without.
"""

import io
import json
import multiprocessing
import os
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_readers import PATIENCE, READERS, run_cases

from defi.errors import UserError
from defi.html import page
from defi.npy import load_npy
from Step1_GFDM.data import read_latents

TESTS = Path(__file__).resolve().parent
SHORT, LONG = 20, 320  # cases of a reader


def run_reader(name: str, place: Path, cases: int) -> list[str]:
    """Everything that went wrong while a reader read `cases` damaged files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hostile_readers"])
    wrong, first = [], 0
    while first < cases:
        process = context.Process(target=run_cases, args=(name, place, first, cases))
        process.start()
        _wait(process, place / "log")
        lines = (
            [json.loads(line) for line in (place / "log").read_text().splitlines()]
            if first or (place / "log").exists()
            else []
        )
        first = cases if process.exitcode == 0 else lines[-1]["case"] + 1 if lines else cases
        if process.exitcode != 0:
            last = lines[-1] if lines else "before the first case"
            wrong.append(f"{name}: ended with {process.exitcode} in {last}")
    files = {line["case"]: line["file"] for line in lines if "file" in line}
    for line in lines:
        if "outcome" in line:
            where = f"{name} {line['case']} ({files[line['case']]})"
            if line["outcome"] not in ("read", "refused"):
                wrong.append(f"{where}: {line['outcome'][:300]}")
            if line["seconds"] > PATIENCE:
                wrong.append(f"{where}: took {line['seconds']:.1f} s")
    acts = (place / "acts").read_text()
    return wrong + ([f"{name}: {acts}"] if acts else [])


def _wait(process: multiprocessing.Process, log: Path) -> None:
    """Until it ends; killed where it works on one case for more than three times the patience."""
    changed, size = time.monotonic(), -1
    while process.is_alive():
        process.join(0.1)
        now = log.stat().st_size if log.exists() else 0
        if now != size:
            changed, size = time.monotonic(), now
        elif time.monotonic() - changed > (3 * PATIENCE if now else 120):
            process.kill()


@pytest.mark.parametrize("cases", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    wrong = run_reader(name, tmp_path, max(1, int(cases * READERS[name].share)))
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- files made to do harm


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_pickles_do_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "pwned"
    np.save(tmp_path / "a.npy", np.array(Evil(canary), dtype=object))
    with pytest.raises(UserError, match=r"a\.npy: refused, it holds the global (posix|os)\.system"):
        load_npy(tmp_path / "a.npy")
    torch.save(Evil(canary), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: cannot read latents"):
        read_latents(tmp_path / "a.pt", np.arange(2))
    assert not canary.exists()


def test_a_short_pickle_may_not_ask_for_gigabytes(tmp_path: Path) -> None:
    """The index of a memo entry makes the interpreter take memory up to it."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    content = b"\x80\x02Nr" + (2**31 - 1).to_bytes(4, "little") + b"."
    assert pickle.loads(b"\x80\x02Nr\x01\x00\x00\x00.") is None, "it is a pickle"
    file = tmp_path / "a.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)
    with pytest.raises(UserError, match="LONG_BINPUT 2147483647"):
        load_npy(file)


def test_a_small_archive_may_not_grow(tmp_path: Path) -> None:
    from defi.calvin import read_frame

    content = io.BytesIO()
    np.save(content, np.zeros((2**14, 2**13, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rgb_static.npy", content.getvalue())
    assert (tmp_path / "a.npz").stat().st_size < 10**6
    with pytest.raises(UserError, match=r"a\.npz: .*rgb_static.npy has 402,653,312 bytes"):
        read_frame(tmp_path / "a.npz", ["rgb_static"])


def test_pages_escape_what_they_show() -> None:
    assert "<script>" not in page("<script>alert(1)</script>", "<img src=x onerror=alert(1)>")
    assert "<img" not in page("a", "<img src=x onerror=alert(1)>")
