"""Stage 2's commands, run as a user runs them, at the smallest size."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from launcher import launch

from benchmarks.rlds_writer import write_videos
from defi.data import open_dataset
from defi.data.calvin import FRAME, Span, encode_frame, frame_name, index_files
from defi.engine.checkpoint import find_checkpoint, find_weights, read_manifest
from defi.engine.log import read_metrics
from defi.video import read_frames, write_mp4
from Step2_GIDM import health, label, train
from Step2_GIDM.data.images import resize
from Step2_GIDM.model import GIDM

SMALL = [
    "gidm.width=32", "gidm.encoder_blocks=1", "gidm.decoder_blocks=1", "gidm.heads=2", "gidm.code_width=8",
    "gidm.dino={image_size: 42, width: 32, layers: 1, heads: 2}", "gidm.restart_pairs=12",
    "text.t5.width=16", "text.t5.layers=1", "text.t5.heads=2", "data.distance=[3,3]", "shown=8",
    "trainer.global_batch=4", "trainer.log_every=1", "trainer.preview_every=0", "trainer.schedule=constant",
]  # fmt: skip


def run(module, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a command with these arguments."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    try:
        module.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bright square that moves as its recorded actions say, in CALVIN's format; 16 clips of 8 frames."""
    root = tmp_path_factory.mktemp("data")
    for split in ("training", "validation"):
        (root / split / "lang_annotations").mkdir(parents=True)
        spans = [Span(8 * k, 8 * k + 7, "move the square", "move") for k in range(16)]
        for number, span in enumerate(spans):
            speed = np.array([np.cos(2.4 * number), np.sin(2.4 * number)])  # directions all round
            for i in range(8):
                frame = {
                    key: np.zeros([n or 48 for n in shape], dtype) for key, (dtype, shape) in FRAME.items()
                }
                x, y = (20 + 2 * speed * i).round().astype(int)
                frame["rgb_static"][y : y + 10, x : x + 10] = 255
                frame["rel_actions"][:2] = speed
                frame["rel_actions"][6] = 1
                (root / split / frame_name(span.start + i)).write_bytes(encode_frame(frame))
        bounds = [(span.start, span.end) for span in spans]
        for name, content in index_files(bounds, spans, {"A": (0, 127)}).items():
            (root / split / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps."""
    output = tmp_path_factory.mktemp("runs") / "gidm"
    with pytest.MonkeyPatch.context() as patch:
        arguments = [f"data.root={data}", f"output={output}", *SMALL, "trainer.max_steps=6"]
        assert run(train, *arguments, "trainer.preview_every=6", monkeypatch=patch) == 0
    return output


def test_training_reports_the_health_of_the_codes(trained: Path) -> None:
    records = read_metrics(trained / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "mse", "perplexity", "dead_codes", "code_usage"} <= set(steps[0])
    (looked,) = (record for record in records if record["kind"] == "preview")
    assert {"mse", "copy_mse", "shuffled_mse", "perplexity", "dead_codes", "variety"} <= set(looked)
    assert (trained / "previews" / "step_00000006" / "gallery.png").read_bytes()[:4] == b"\x89PNG"
    assert read_manifest(trained, "gidm")["preset"] == "tiny"


def test_a_stopped_run_continues_exactly(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, counters and restarts of 6 steps equal those of 4 steps, stop, and 2 more."""
    stopped = [f"data.root={data}", f"output={tmp_path / 'stopped'}", *SMALL]
    assert run(train, *stopped, "trainer.max_steps=4", monkeypatch=monkeypatch) == 0
    assert run(train, *stopped, "trainer.max_steps=6", "resume=true", monkeypatch=monkeypatch) == 0
    runs = (trained, tmp_path / "stopped")
    states = [GIDM.from_pretrained(find_checkpoint(output)).state_dict() for output in runs]
    assert states[0]["core.tokenizer.quantizer.restarts"] > 0, "codes were restarted on the way"
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_health(trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [f"checkpoint={trained}", f"data.root={data}", "data.distance=[3,3]", "pairs=112"]
    assert run(health, *arguments, f"output={tmp_path / 'codes'}", monkeypatch=monkeypatch) == 0
    numbers = json.loads((tmp_path / "codes" / "health.json").read_text())
    assert set(numbers["probe"]) == {"codes", "random codes", "feature differences"}
    assert numbers["probe"]["feature differences"]["all"] > 0.25, "pixels say how the square moves"
    assert numbers["probe"]["random codes"]["all"] < 0.1
    assert set(numbers["probe"]["codes"]) == {"dx", "dy", "all"}, "actions that vary"
    assert (tmp_path / "codes" / "gallery.png").is_file() and (tmp_path / "codes" / "transfer.png").is_file()
    assert numbers["transfer_cosine"] is None or -1 <= numbers["transfer_cosine"] <= 1
    before = sorted((tmp_path / "codes").iterdir())
    assert run(health, *arguments, f"output={tmp_path / 'codes'}", monkeypatch=monkeypatch) == 2
    assert sorted((tmp_path / "codes").iterdir()) == before


def test_health_of_any_robot(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What the probe reads has the data's names; what is held out must not be what it was fitted on."""
    toy = write_videos(tmp_path, {"train": [[9] * 6], "val": [[9] * 3]})
    given = [
        f"checkpoint={trained}",
        "data=rlds",
        f"data.root={toy}",
        f"output={tmp_path / 'codes'}",
        "pairs=40",
    ]
    assert run(health, *given, "data.held_out=train", monkeypatch=monkeypatch) == 2
    assert "data.held_out=train: is the training split; name another" in capsys.readouterr().err
    assert run(health, *given, monkeypatch=monkeypatch) == 0
    found = json.loads((tmp_path / "codes" / "health.json").read_text())["probe"]["codes"]
    assert list(found) == [*(f"action_{i}" for i in range(7)), "all"]
    told = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert told == list(found), "a row for each"


def test_label_a_video(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (80, 64, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "video.mp4", frames, 10)
    arguments = [f"checkpoint={trained}", "data=videos", f"data.root={tmp_path / 'video.mp4'}"]
    arguments += ["data.distance=[5,5]", f"output={tmp_path / 'codes.npz'}"]
    assert run(label, *arguments, monkeypatch=monkeypatch) == 0
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as file:
        labels = dict(file)
    assert labels["frame"].tolist() == list(range(80))
    assert labels["later"].tolist() == [min(i + 5, 79) for i in range(80)]
    model = GIDM.from_pretrained(find_weights(trained, "gidm")).eval()
    np.testing.assert_array_equal(labels["codebook"], model.tokenizer.quantizer.codebook.detach().numpy())
    pixels = torch.from_numpy(read_frames(tmp_path / "video.mp4", [7, 12])).permute(0, 3, 1, 2)
    pair = resize(pixels, model.config.dino.image_size)
    assert labels["indices"][7].tolist() == model.encode(model.patches(pair[None]), [""]).indices[0].tolist()
    assert labels["name"].tolist() == ["video"] and labels["camera"].tolist() == ["rgb"]
    assert run(label, *arguments, monkeypatch=monkeypatch) == 2, "the file exists"


def test_label_leaves_out_what_cannot_be_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And no half-written table where nothing can be read. One frame is a clip, too."""
    pytest.importorskip("pyarrow")
    for name, length in (("a", 60), ("b", 60), ("c", 1)):
        frames = np.random.default_rng(0).integers(0, 256, (length, 64, 64, 3), dtype=np.uint8)
        write_mp4(tmp_path / "videos" / f"{name}.mp4", frames, 10)
    (tmp_path / "videos" / "d.mp4").write_bytes(b"no video")
    cut = tmp_path / "videos" / "b.mp4"
    with pytest.warns(UserWarning, match="left out"):
        open_dataset({"format": "videos", "root": str(cut.parent)}, "all")  # numbers the frames
    seen = cut.stat()  # then the file is damaged, and looks as it did
    cut.write_bytes(bytes(seen.st_size))
    os.utime(cut, ns=(seen.st_mtime_ns, seen.st_mtime_ns))
    table = tmp_path / "codes.parquet"
    arguments = [f"checkpoint={trained}", "data=videos", f"data.root={cut.parent}", f"output={table}"]
    assert run(label, *arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert f"left out: {cut}: " in printed
    told = "left out: clips that cannot be read (1), videos that cannot be opened (1)"
    assert f"{table}: 61 pairs of 2 clips of {cut.parent}; {told}" in printed
    shared = tmp_path / "shared.parquet"
    launch("../Step2_GIDM/label.py", *arguments[:-1], f"output={shared}")
    assert shared.read_bytes() == table.read_bytes(), "whichever process came upon it"
    for name in ("a", "c"):
        (cut.parent / f"{name}.mp4").unlink()
    assert run(label, *arguments, "overwrite=true", monkeypatch=monkeypatch) == 2
    assert f"data: none of 1 clips can be read; the first: {cut}: " in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_label_takes_all_episodes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Those that training would hold out, too."""
    toy = write_videos(tmp_path, {"train": [[3, 2, 4]], "test": [[2]]})
    arguments = [f"checkpoint={trained}", "data=rlds", f"data.root={toy}", f"data.index={tmp_path}"]
    for split, told in (
        ("null", "9 pairs of 3 clips of {} (train); left out: the split test (data.split)"),
        ("train[:1]", "3 pairs of 1 clips of {} (train[:1]); left out: the split test (data.split), "
         "2 episodes of train (data.split)"),
        ("null data.trim=[1,1]", "3 pairs of 2 clips of {} (train); left out: clips without frames (1), "
         "the split test (data.split), 1 and 1 steps at their ends (data.trim)"),
    ):  # fmt: skip
        split, *more = split.split()
        given = [*arguments, f"data.split='{split}'" if "[" in split else f"data.split={split}", *more]
        given += [f"output={tmp_path / 'codes.npz'}", "overwrite=true"]
        assert run(label, *given, monkeypatch=monkeypatch) == 0
        assert f"codes.npz: {told.format(toy / '1.0.0')}\n" in capsys.readouterr().out


def test_label_rlds_as_a_table(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows as Parquet and as npz."""
    parquet = pytest.importorskip("pyarrow.parquet")
    toy = write_videos(tmp_path, {"train": [[4, 1, 3]], "val": [[2]]})
    arguments = [f"checkpoint={trained}", "data=rlds", f"data.root={toy}", f"data.index={tmp_path}"]
    for suffix in ("parquet", "npz"):
        assert run(label, *arguments, f"output={tmp_path / 'codes'}.{suffix}", monkeypatch=monkeypatch) == 0
    table = parquet.read_table(tmp_path / "codes.parquet")
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as arrays:
        assert table["name"].to_pylist() == ["000000"] * 4 + ["000001"] + ["000002"] * 3
        assert table["text"].to_pylist() == ["do thing 0"] * 4 + ["do thing 1"] + ["do thing 2"] * 3
        assert table["text"].to_pylist() == arrays["text"][arrays["said"]].tolist()
        for key in ("name", "start", "camera"):
            assert table[key].to_pylist() == arrays[key][arrays["clip"]].tolist()
        for key in ("frame", "later", "indices"):
            assert table[key].to_pylist() == arrays[key].tolist()
        codebook = json.loads(table.schema.metadata[b"codebook"])
        np.testing.assert_allclose(codebook, arrays["codebook"])
    assert not list(tmp_path.glob(".*writing"))


def test_train_on_rlds_and_on_a_mixture(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = write_videos(tmp_path, {"train": [[6, 7]], "val": [[5]]})
    small = [*(a for a in SMALL if "distance" not in a), "trainer.max_steps=2", f"output={tmp_path / 'run'}"]
    cache = f"data.index={tmp_path / 'index'}"
    assert run(train, "data=rlds", f"data.root={toy}", cache, *small, monkeypatch=monkeypatch) == 0
    rlds = f"{{format: rlds, root: {toy}, weight: 0.5, index: {tmp_path / 'index'}, distance: [2, 2]}}"
    calvin = f"{{format: calvin, root: {data}, weight: 1}}"
    mixture = ["data=mixture", f"+data.sets.toy={rlds}", f"+data.sets.own={calvin}", "overwrite=true"]
    assert run(train, *mixture, *small, "trainer.preview_every=2", monkeypatch=monkeypatch) == 0
    assert read_manifest(tmp_path / "run", "gidm")["step"] == 2


def test_train_on_a_folder_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text, no labels, subfolders; a damaged video is left out."""
    for number, name in enumerate(("a.mp4", "kitchen/b.mp4", "kitchen/c.mov")):
        frames = np.random.default_rng(number).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
        write_mp4(tmp_path / "videos" / name, frames, 10)
    (tmp_path / "videos" / "damaged.mp4").write_bytes(b"not a video")
    arguments = ["data=videos", f"data.root={tmp_path / 'videos'}", f"output={tmp_path / 'run'}"]
    with pytest.warns(UserWarning, match=r"1 of 4 videos left out; the first: .*damaged\.mp4"):
        steps = ["trainer.max_steps=2", "trainer.preview_every=2"]
        assert run(train, *arguments, *SMALL, *steps, monkeypatch=monkeypatch) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert read_manifest(tmp_path / "run", "gidm")["step"] == 2
    model = GIDM.from_pretrained(find_weights(tmp_path / "run", "gidm")).eval()
    assert model.encode(model.patches(torch.rand(1, 2, 3, 42, 42)), [""]).indices.shape == (1, 4)


def test_controllable_run_starts_from_a_language_run(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"data.root={data}", f"output={tmp_path / 'run'}", *SMALL, "trainer.max_steps=2"]
    arguments += ["gidm.variant=controllable", "gidm.codes=4"]
    assert run(train, *arguments, monkeypatch=monkeypatch) == 2, "no first stage given"
    assert not (tmp_path / "run").exists()
    assert run(train, *arguments, f"first_stage={trained}", monkeypatch=monkeypatch) == 0
    first, second = (GIDM.from_pretrained(find_weights(path)) for path in (trained, tmp_path / "run"))
    assert torch.equal(second.tokenizer.frozen_quantizer.codebook, first.tokenizer.quantizer.codebook)
    again = [*arguments, f"first_stage={tmp_path / 'run'}", "overwrite=true", f"output={tmp_path / 'again'}"]
    assert run(train, *again, monkeypatch=monkeypatch) == 2, "the first stage is controllable itself"


@pytest.mark.parametrize(
    ("module", "arguments", "named"),
    [
        (train, ["data.root=/nowhere"], "/nowhere"),
        (train, ["data.source=rlds"], "data.source=: no longer a setting; use data.format"),
        (train, ["data=rlds", "data.image=image"], "data.image=: no longer a setting; use data.cameras"),
        (label, ["data.language=true"], "data.language=: no longer a setting; of CALVIN write data.spans="),
        (train, ["data=rlds", "data.fps=0", "data.trim=[1]"], "data.trim=[1]: must be"),
        (train, ["gidm.variant=wild"], "gidm.variant=wild"),
        (train, ["first_stage=somewhere"], "first_stage=somewhere"),
        (train, ["gidm.dino.image_size=50"], "image_size=50"),
        (health, ["checkpoint=/nowhere"], "/nowhere"),
        (label, ["output=codes.txt"], "codes.txt"),
    ],
)
def test_mistakes_end_in_one_line_and_change_nothing(
    module, arguments: list[str], named: str, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(module, f"data.root={data}", "output=out", *arguments, monkeypatch=monkeypatch) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("error: ") and named in message[0]
    assert list(tmp_path.iterdir()) == []
