"""Command lines: a wrong one is one line that names the setting and the way out."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from defi.config import check_settings, entry, one_line_errors, typed
from defi.engine.config import TrainerConfig
from defi.errors import UserError
from Step3_DeFI import config  # noqa: F401  (the policy's settings by name)


@entry("step3_train")
def command(cfg: DictConfig) -> None:
    """Any command; leaves a setting that it was given."""
    Path("told").write_text(str(cfg.trainer.lr))


GIVEN = ("data.store=a", "gfdm_checkpoint=b", "gidm_checkpoint=c", "output=d")


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("trainer.lrr=3", "error: trainer.lrr=: no such setting; did you mean trainer.lr=? --cfg job prints"),
        ("trainr.lr=3", "error: trainr=: no such setting; did you mean trainer="),
        ("tracker.xyz=3", "error: tracker.xyz=: no such setting; there are tracker."),
        (
            "policy.action_head.action_positions=true",
            "error: policy.action_head.action_positions=: no longer a setting; positions come with policy.",
        ),
        ("data.tail=9", "error: data.tail=: no longer a setting; use data.min_remaining instead"),
        (
            "policy.latent_action.codes=8",
            "error: policy.latent_action=: no longer a setting; its sizes are read",
        ),
        (
            "trainer.sample_every=2",
            "error: trainer.sample_every=: no longer a setting; write trainer.preview_every",
        ),
        ("data.video_stride=2", "error: data.video_stride=: no longer a setting; frames are as far apart"),
        ("data=nope", "error: data=nope: no such choice; choose from bridge, calvin, "),
        ("data=pairs_rlds", "error: data=pairs_rlds: no longer a choice; write data=rlds\n"),
        ("preset=huge", "error: preset=huge: no such choice; choose from paper, "),
        ("trainer.lr=[1", "error: trainer.lr=[1: cannot be read; close its brackets, or quote a text"),
        ("trainer.lr", "error: trainer.lr: not a setting; write key=value"),
        ("output=~/run", "error: output=~/run: the shell leaves this ~ as it is; write output=$HOME/run"),
        (
            "trainer.lr=${nope}",
            "error: Interpolation key 'nope' not found; a text with ${ is written with \\${",
        ),
        (
            "output=a,\n${b}",
            "error: output=a, ${b}: cannot be read; close its brackets, or quote a text with accents, "
            "brackets, commas or signs: 'output=\"a, \\${b}\"'",
        ),
        ('output="${"', 'error: Error merging override output="${"'),
        ("output=[a]", "error: output=[a]: is read as list; quote a text: 'output=\"[a]\"'"),
        ("output={a: 1}", "error: output={a: 1}: is read as dict; quote a text: 'output=\"{a: 1}\"'"),
        ("output=2026", "error: output=2026: is read as int; quote a text: 'output=\"2026\"'"),
        ("data.root=1e3", "error: data.root=1e3: is read as float; quote a text: 'data.root=\"1e3\"'"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    argument: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *GIVEN, argument])
    with pytest.raises(SystemExit) as left:
        command()
    printed = capsys.readouterr().err
    assert left.value.code == 2
    assert printed.startswith(told) and printed.count("\n") == 1


TEXTS = ["my vidéos", "runs [1]", "a=b", "it's (new)", 'a "b"', "a, then b", ",", 'it\'s, "x"', "a, b\\"]
TEXTS += ["choice(a,b)", "range(3)", "glob(*)", "f(x)", "a; b", "#1", "<a>", "a & b", "把, 推"]


@pytest.mark.parametrize("folder", TEXTS)
def test_a_folder_that_needs_quotes_is_shown_with_them(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *GIVEN, f"output={folder}"])
    with pytest.raises(SystemExit):
        command()
    told, _, quoted = capsys.readouterr().err.rpartition(": ")
    assert told.startswith(f"error: output={folder}: cannot be read; ")
    (setting,) = shlex.split(quoted)  # as the shell hands it on
    assert OverridesParser.create().parse_override(setting).value() == folder


@pytest.mark.parametrize("text", ["open the drawer", "50% off", "-x", "a: b", "$5", "a\\b", "a/b@c", "5 cm"])
def test_texts_that_need_no_quotes(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["c", "data.root=a", "checkpoint=b", "output=c", f"instruction={text}"])
    entry("step1_eval")(lambda cfg: read.append(cfg.instruction))()
    assert read == [text]


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    code = "from defi.config import entry\nentry('doctor')(lambda cfg: print('T\\udcfcr'))()"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (0, "T\\udcfcr\n"), done.stderr


def test_a_right_command_line_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *GIVEN, "trainer.lr=3"])
    command()
    assert (tmp_path / "told").read_text() == "3"


def test_overwrite_deletes_nothing_that_the_command_reads(tmp_path: Path) -> None:
    data = {"root": f"{tmp_path}/demos", "split": "x"}
    settings = {"output": str(tmp_path), "overwrite": True, "data": data}
    with pytest.raises(UserError, match=r"overwrite=true would delete data\.root=.*demos, which is in it"):
        check_settings(OmegaConf.create(settings), [])
    check_settings(OmegaConf.create(settings | {"overwrite": False}), [])
    check_settings(OmegaConf.create(settings | {"output": f"{tmp_path}/out"}), [])


def test_what_was_not_given_is_named() -> None:
    cfg = OmegaConf.create({"output": "???", "data": {"root": "???"}, "copy": "${output}"})
    with pytest.raises(UserError, match="data.root=: not given; this command needs data.root=, output="):
        check_settings(cfg, [])


def test_ctrl_c_is_one_word(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise KeyboardInterrupt
    assert left.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_a_long_text_of_a_file_is_searched_once() -> None:
    """For references; looking for one from each sign on would take an hour for this."""
    with pytest.raises(UserError, match=r"^here: \$\{oc.env:HOME\} refers to something outside"):
        typed(TrainerConfig, {"schedule": 10**6 * "x" + "'", "precision": "${oc.env:HOME}"}, "here")
