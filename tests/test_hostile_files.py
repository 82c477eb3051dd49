"""Damaged and hostile files through every reader: a clear error or an answer.

Never a crash, a hang, gigabytes of memory, or code run (docs/security.md). Almost 5,000 files with --slow.
"""

import io
import json
import multiprocessing
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_process import PATIENCE, run_cases
from hostile_readers import READERS
from policy_fakes import build_gidm

from defi.archive import open_files
from defi.checkpoints.files import read_foreign
from defi.checkpoints.torchscript import read_torchscript
from defi.errors import UserError
from defi.files import read_yaml
from defi.html import TEMPLATES
from defi.npy import load_npy
from defi.sim import scene
from Step1_GFDM.data import read_latents
from Step2_GIDM.model import GIDM

TESTS = Path(__file__).resolve().parent
SHORT, LONG = 20, 320  # cases of a reader


def run_reader(name: str, place: Path, cases: int) -> list[str]:
    """Everything that went wrong while a reader read `cases` damaged files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hostile_process"])
    wrong, first = [], 0
    while first < cases:
        process = context.Process(target=run_cases, args=(name, place, first, cases))
        process.start()
        _wait(process, place / "log")
        text = (place / "log").read_text() if (place / "log").exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        if process.exitcode == 0:
            break
        last = lines[-1]["case"] if lines else -1
        if last < first:
            return [*wrong, f"{name}: the harness ended with {process.exitcode} before case {first}"]
        wrong.append(f"{name}: ended with {process.exitcode} in {lines[-1]}")
        first = last + 1
    files = {line["case"]: line["file"] for line in lines if "file" in line}
    for line in lines:
        if "outcome" in line:
            where = f"{name} {line['case']} ({files[line['case']]})"
            if line["outcome"] not in ("read", "refused"):
                wrong.append(f"{where}: {line['outcome'][:300]}")
            if line["work"] > PATIENCE or line["seconds"] > 9 * PATIENCE:  # others may use the processors too
                wrong.append(f"{where}: took {line['seconds']:.1f} s, worked for {line['work']:.1f}")
    acts = (place / "acts").read_text()
    return wrong + ([f"{name}: {acts}"] if acts else [])


def _wait(process: multiprocessing.Process, log: Path) -> None:
    """Until it ends; killed where it hangs: in one case for a minute, or before its first one for longer."""
    changed, size = time.monotonic(), log.stat().st_size if log.exists() else 0
    begun = False
    while process.is_alive():
        process.join(0.1)
        now = log.stat().st_size if log.exists() else 0
        if now != size:
            changed, size, begun = time.monotonic(), now, True
        elif time.monotonic() - changed > (60 if begun else 180):
            process.kill()


@pytest.mark.parametrize("cases", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
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
    with pytest.raises(UserError, match=r"a\.npy: cannot be read \(refers to (posix|os)\.system"):
        load_npy(tmp_path / "a.npy")
    torch.save(Evil(canary), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: cannot be read"):
        read_latents(tmp_path / "a.pt", np.arange(2))
    assert not canary.exists()


@pytest.mark.parametrize("read", [load_npy, read_torchscript])
@pytest.mark.parametrize(
    ("opcode", "size", "end"), [(pickle.LONG_BINPUT, 4, b""), (pickle.BYTEARRAY8, 8, b"\x01")]
)
def test_a_short_pickle_may_not_ask_for_gigabytes(
    read: Callable, opcode: bytes, size: int, end: bytes, tmp_path: Path
) -> None:
    """The index of a memo entry, or the length of an array, makes the interpreter take memory up to it."""
    content, short = (b"\x80\x05N" + opcode + n.to_bytes(size, "little") + end + b"." for n in (2**27, 1))
    assert pickle.loads(short) in (None, bytearray(end)), "it is a pickle"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    file = tmp_path / "a.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)
    if read is read_torchscript:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"a\.npy: (cannot be read|a TorchScript archive without tensors)"):
        read(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**5, "kilobytes"


def test_a_torchscript_archive_may_not_grow(tmp_path: Path) -> None:
    """What `torch.jit.save` wrote, packed: tensors could then take a thousand times the file's size."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "a.pt")
    assert len(read_torchscript(tmp_path / "a.pt")) == 2
    with zipfile.ZipFile(tmp_path / "a.pt") as stored, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(UserError, match=r"b\.pt: cannot be read \(data\.pkl is compressed"):
        read_torchscript(tmp_path / "b.pt")


def test_a_file_of_torch_save_may_not_grow(tmp_path: Path) -> None:
    """A packed pickle could take a thousand times the file's size, before its tensors are looked at."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as stored, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as packed:
        for name in stored.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
            packed.writestr(name, stored.read(name), kind)
    assert read_foreign(tmp_path / "a.pt")["a"].tolist() == [1, 1]
    for read in (read_foreign, lambda file: read_latents(file, np.array([0]))):
        with pytest.raises(UserError, match=r"b\.pt: cannot be read \(its members are compressed"):
            read(tmp_path / "b.pt")


def test_a_small_archive_may_not_grow(tmp_path: Path) -> None:
    from defi.data.calvin import read_frame

    content = io.BytesIO()
    np.save(content, np.zeros((2**14, 2**13, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rgb_static.npy", content.getvalue())
    assert (tmp_path / "a.npz").stat().st_size < 10**6
    with pytest.raises(UserError, match=r"a\.npz: .*rgb_static.npy has 402,653,312 bytes"):
        read_frame(tmp_path / "a.npz", ["rgb_static"])


def test_members_of_an_archive_stay_in_it(tmp_path: Path) -> None:
    """They are read where they lie, by name; none is ever written to the disk."""
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    names = ("training/a", "training/../../../evil", "/training/evil", "training/../a")
    with zipfile.ZipFile(place / "data.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    files = open_files(place / "data.zip" / "training")
    assert files.read("a") == b"training/a" and "../a" in files
    with pytest.raises(UserError, match="missing in the zip"):
        files.read("../../../../etc/passwd")
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "er", "data.zip"]


def test_yaml_is_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tags that name code, no aliases that multiply, nothing from the environment, nothing called."""
    monkeypatch.setenv("DEFI_SECRET", "sesame")
    file = tmp_path / "config.yaml"
    for text in (
        "a: !!python/object/apply:os.system ['touch pwned']",
        "a: !!python/name:os.system",
        "a: &x [1]\nb: *x",
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
            read_yaml(file, "copy it again")
    file.write_text("a: ${oc.env:DEFI_SECRET}\nb: {_target_: os.system, _args_: [touch pwned]}")
    found = read_yaml(file, "copy it again")
    assert found["a"] == "${oc.env:DEFI_SECRET}" and found["b"]["_target_"] == "os.system"


def test_a_stored_config_calls_nothing_and_reads_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEFI_SECRET", "sesame")
    build_gidm().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"_target_": "os.system", "_args_": ["touch pwned"]}, "_target_"),
        ({"text": values["text"] | {"pretrained": "${oc.env:DEFI_SECRET}"}}, "refers to something outside"),
        ({"dino": {"_target_": "os.system"}}, "_target_"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=message) as caught:
            GIDM.from_pretrained(tmp_path)
        assert "config.json" in str(caught.value) and "sesame" not in str(caught.value)


def test_nothing_but_the_official_simulator_is_called_by_a_configs_word() -> None:
    """Hydra would call any `_target_`: one place asks it to, after a check (`defi.sim.official`)."""
    root = TESTS.parent
    files = [
        p for part in ("defi", "Step1_GFDM", "Step2_GIDM", "Step3_DeFI") for p in root.glob(f"{part}/**/*.py")
    ]
    calls = ("hydra.utils", "instantiate(", "get_class(", "get_method(", "pickle.load(", "weights_only=False")
    found = {str(f.relative_to(root)) for f in files if any(call in f.read_text() for call in calls)}
    assert found == {"defi/sim/official.py"}


def test_a_clone_may_only_name_the_packages_classes(tmp_path: Path) -> None:
    file = tmp_path / "scene.yaml"
    file.write_text("_target_: calvin_env.scene.play_table_scene.PlayTableScene\nobjects: {a: 1}")
    assert scene._read(file)["objects"] == {"a": 1}
    for target in ("os.system", "calvin_env.scene.play_table_scene.os.system"):
        file.write_text(f"objects: [{{deep: {{_target_: {target}}}}}]")
        with pytest.raises(UserError, match=rf"scene\.yaml: would call {target}"):
            scene._read(file)


def test_pages_escape_what_they_show() -> None:
    hostile = {"title": "<script>alert(1)</script>", "subtitle": "<img src=x onerror=alert(1)>"}
    page = TEMPLATES.get_template("defi/assets/page.html.j2").render(hostile)
    assert "<script>" not in page and "<img" not in page and "&lt;script&gt;alert(1)" in page
