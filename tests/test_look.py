"""A look at data: every format is shown, and what looks wrong is named and nothing else."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from test_html import parse

from benchmarks.rlds_writer import write_videos
from defi.data import calvin, convert, formats, look
from defi.text import build_tokenizer
from defi.video import frame_count, write_mp4

TEXT = "push <b>the [red] block</b>"
LENGTHS = (12, 15)


def run(command: Callable[[], None], *settings: str) -> None:
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *settings])
        command()


def frames(length: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 256, (length, side, side, 3), dtype=np.uint8)


def numbers(length: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (length, width))


def write_calvin(root: Path) -> None:
    spans, first, split = [], 0, root / "training"
    for length in LENGTHS:
        pictures, actions, state = frames(length), numbers(length, 7), numbers(length, 15)
        actions[:, 6] = 1
        for i in range(length):
            frame = {
                "rgb_static": pictures[i],
                "rgb_gripper": pictures[i, :16, :16],
                "scene_obs": np.zeros(24),
            }
            frame |= {"rel_actions": actions[i], "actions": np.zeros(7), "robot_obs": state[i]}
            split.mkdir(parents=True, exist_ok=True)
            (split / calvin.frame_name(first + i)).write_bytes(calvin.encode_frame(frame))
        spans.append(calvin.Span(first, first + length - 1, TEXT, "push"))
        first += length
    recordings = [(span.start, span.end) for span in spans]
    for name, content in calvin.index_files(recordings, spans, {}).items():
        (split / name).parent.mkdir(exist_ok=True)
        (split / name).write_bytes(content)


def write_hdf5(root: Path, lengths: tuple[int, ...] = LENGTHS, **change: Callable) -> None:
    h5py = pytest.importorskip("h5py")
    root.mkdir(parents=True, exist_ok=True)
    for number, length in enumerate(lengths):
        values = {"pictures": frames(length), "text": TEXT}
        values |= {"action": numbers(length, 4, number), "qpos": numbers(length, 5, 9 + number)}
        for name, how in change.items():
            values[name] = how(number, values[name])
        with h5py.File(root / f"{number}.hdf5", "w") as file:
            file["observations/images/top"], file["action"] = values["pictures"], values["action"]
            file["observations/qpos"], file.attrs["language_instruction"] = values["qpos"], values["text"]


def write_lerobot(root: Path) -> None:
    write_calvin(root.parent / "before")
    run(convert.main, "data=calvin", f"data.root={root.parent / 'before'}", f"output={root}")


def write_rlds(root: Path) -> None:
    write_videos(root.parent, {"train": [LENGTHS], "val": [[3]]}, name=root.name)


def write_video_folder(root: Path) -> None:
    lines = []
    for number, length in enumerate(LENGTHS):
        write_mp4(root / f"{number}.mp4", frames(length), 10)
        lines.append(json.dumps({"video": f"{number}.mp4", "text": TEXT}))
    (root / "captions.jsonl").write_text("\n".join(lines))


def write_vpp(root: Path) -> None:
    for number, length in enumerate(LENGTHS):
        (root / "annotation/train").mkdir(parents=True, exist_ok=True)
        write_mp4(root / f"videos/{number}/rgb.mp4", frames(length), 10)
        said = {"texts": [TEXT], "videos": [{"video_path": f"videos/{number}/rgb.mp4"}]}
        said |= {"action": numbers(length, 4).tolist(), "state": numbers(length, 2).tolist()}
        (root / f"annotation/train/{number}.json").write_text(json.dumps(said))


# How to write data of a format; settings; cameras; charts: each episode's actions.
FORMATS = {
    "calvin": (write_calvin, (), 2, 2),
    "hdf5": (write_hdf5, (), 1, 2),
    "lerobot": (write_lerobot, (), 2, 2),
    "rlds": (write_rlds, ("data.fps=5",), 1, 2),
    "videos": (write_video_folder, ("data.captions=captions.jsonl",), 1, 0),
    "vpp": (write_vpp, (), 1, 2),
}


@pytest.mark.parametrize("name", formats())
def test_every_format_is_shown(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write, settings, cameras, charts = FORMATS[name]
    root, output = tmp_path / "data", tmp_path / "look"
    write(root)
    run(look.main, f"data={name}", f"data.root={root}", f"output={output}", *settings)
    said, page = capsys.readouterr().out, parse(output / "index.html")
    text = "do thing 0" if name == "rlds" else TEXT
    assert text in said and text in page.text and "27" in said and "12 to 15 frames" in said
    clips = sorted((output / "clips").iterdir())
    assert sorted(map(frame_count, clips)) == [12] * cameras + [15] * cameras
    assert sum(source.startswith("data:video/mp4") for source in page.sources) == 2 * cameras
    assert sum(source.startswith("data:image/svg") for source in page.sources) == charts


def test_statistics_are_exact_and_good_data_look_well(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_hdf5(tmp_path / "data", (40, 50, 60))
    data = ["data=hdf5", f"data.root={tmp_path / 'data'}", "part=all"]
    run(look.main, *data, f"output={tmp_path / 'look'}", "clips=1")
    said, page = capsys.readouterr().out, parse(tmp_path / "look/index.html")
    assert "wrong:" not in said and "Nothing of what was looked for." in page.text
    column = np.concatenate([numbers(length, 4, seed) for seed, length in enumerate((40, 50, 60))])[:, 1]
    column = column.astype(np.float32).astype(np.float64)
    low, high = np.quantile(column, (0.01, 0.99))
    for value in (column.min(), low, column.mean(), column.std(), high, column.max()):
        assert f"{value:.4g}" in said and f"{value:.4g}" in page.text
    with pytest.raises(SystemExit):
        run(look.main, *data, f"output={tmp_path / 'look'}")
    assert "exists and is not empty; overwrite=true replaces it" in capsys.readouterr().err
    run(look.main, *data, f"output={tmp_path / 'look'}", "overwrite=true", "clips=3")
    assert len(list((tmp_path / "look/clips").iterdir())) == 3


def test_what_looks_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def action(number: int, values: np.ndarray) -> np.ndarray:
        values[:, 2] = 0.5
        values[:, 3] = 0 if number else np.arange(len(values)) == 3
        if number == 3:
            values[7, 0] = -1000
        return numbers(len(values), 4, 77) * [1, 1, 0, 0] + [0, 0, 0.5, 0] if number in (4, 5) else values

    def qpos(number: int, values: np.ndarray) -> np.ndarray:
        if number == 2:
            values[:20], values[-9:] = values[20], values[-9]
        return values

    texts = ["", TEXT, "open " * 80, TEXT, TEXT, TEXT, TEXT]
    lengths = (50, 50, 50, 50, 60, 60, 8)
    write_hdf5(
        tmp_path / "data",
        lengths,
        action=action,
        qpos=qpos,
        text=lambda number, _: texts[number],
        pictures=lambda number, values: values * (number != 1),
    )
    (tmp_path / "data/torn.hdf5").write_bytes((tmp_path / "data/0.hdf5").read_bytes()[:3000])
    run(look.main, "data=hdf5", f"data.root={tmp_path / 'data'}", "part=all", f"output={tmp_path / 'look'}")
    said, page = capsys.readouterr().out, parse(tmp_path / "look/index.html")
    lines = [line.removeprefix("wrong: ") for line in said.splitlines() if line.startswith("wrong: ")]
    expected = (
        "cannot be read: torn (",
        "camera top: pictures of one colour: 1",
        "shorter than 10 frames: 6",
        "without an instruction: 0",
        "CLIP reads 77 tokens, these have more (by an estimate; tokenizer=ckpts/clip is no folder): 'open",
        "actions never change: action_2",
        "actions are the same in 49 of 50 frames: action_3",
        "actions: action_0 lies far out in 1 frames: -1000 in frame 7 of 3, usual is -0.9",
        "the same actions: 4 = 5",
        "idle for more than a quarter, at start + end: 2 (20 + 8 of 50 frames)",
    )
    assert len(lines) == len(expected), lines
    for line, start in zip(lines, expected):
        assert line.startswith(start) and line in page.text


def test_numbers_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_hdf5(tmp_path / "short", action=lambda number, values: values[: len(values) - number])
    write_hdf5(
        tmp_path / "nan",
        action=lambda number, values: np.where(np.arange(len(values))[:, None] == 3, np.inf, values),
    )
    for name in ("short", "nan"):
        given = [f"data.root={tmp_path / name}", "part=all", f"output={tmp_path / 'look' / name}"]
        run(look.main, "data=hdf5", *given)
    said = " ".join(capsys.readouterr().out.split())
    assert "1.hdf5: action has 14 rows for 15 pictures" in said
    assert re.search(
        r"actions none that can be read .*wrong: \S+/nan: episode 0, frame 3: action_0 is -?inf; correct it",
        said,
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("part=some",), "part=some: choose training, held_out or all"),
        (("clips=0",), "clips=0, checked=100: must be at least 1"),
        (("data=mixture",), "data: several data sets; look at one of them"),
        (("data.root=none",), "none"),
    ],
)
def test_settings_that_cannot_be(
    settings: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = () if settings[0].startswith("data=") else ("data.root=x",)
    with pytest.raises(SystemExit):
        run(look.main, *root, f"output={tmp_path / 'look'}", *settings)
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {said}") and errors.count("\n") == 1
    assert not (tmp_path / "look").exists()


def test_tokens_are_estimated_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert look.estimate_tokens("open the drawer") == 5 and look.estimate_tokens("Tür") == 2 + 1 + 2 + 1
    write_hdf5(tmp_path / "data")
    marks = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}
    tokenizer = build_tokenizer(**marks, tokens=77)
    tokenizer.save_pretrained(tmp_path / "clip")
    given = ["data=hdf5", f"data.root={tmp_path / 'data'}", "part=all", f"output={tmp_path / 'look'}"]
    run(
        look.main, *given, f"tokenizer={tmp_path / 'clip'}", f"tokens={len(tokenizer(TEXT)['input_ids']) - 1}"
    )
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"wrong: CLIP reads {len(tokenizer(TEXT)['input_ids']) - 1} tokens, these have more (counted" in said
    )
    with pytest.raises(SystemExit):
        run(look.main, *given, "overwrite=true", f"tokenizer={tmp_path / 'data'}")
    assert "data: cannot be read (" in capsys.readouterr().err
