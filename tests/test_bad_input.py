"""Data that are missing, damaged or unsafe: one line that says what and where, and a later start goes on."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from policy_fakes import write_demonstrations
from preparations import run, write_inputs

from benchmarks.rlds_writer import write_set, write_videos
from defi.data import open_dataset
from defi.data.calvin import ANNOTATIONS, encode_frame, frame_name
from defi.data.rlds import RLDSDataset, dataset
from defi.data.rlds.tfrecord import read_records
from defi.data.rlds.write import features_dict, image, text
from defi.engine.data import readable
from defi.errors import UserError, reading
from defi.picture import encode_picture
from defi.video import write_mp4
from Step1_GFDM import prepare
from Step1_GFDM.data import read_episodes
from Step2_GIDM import train
from Step2_GIDM.data.build import build_pairs

HIDDEN = b"\0\5\x16\7\0\2\0\0Mac OS X"  # how files begin that macOS puts beside others


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def fails(module, capsys: pytest.CaptureFixture, *settings: str) -> str:
    """The one line with which a command ends."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [module.__name__, *settings])
        module.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        (
            prepare,
            "data=videos data.captions=captions.jsonl",
            "none/captions.jsonl: missing; give the captions",
        ),
        (prepare, "data=vpp", "none/annotation/train: no annotations"),
        (prepare, "data=hdf5", "none: no HDF5 files here"),
        (prepare, "data=rlds", "none: no features.json here"),
        (prepare, "data=calvin", "none/training: no such folder"),
        (train, "data=videos", "none: no videos here"),
        (train, "data=rlds", "none: no features.json here"),
        (train, "data=pairs_oxe data.mixture=rt_1", "none/fractal20220817_data: no features.json here"),
        (train, "data=calvin", "none/training: no such folder"),
    ],
)
def test_empty_folders(
    module, source: str, message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "none").mkdir()
    given = [*source.split(), f"data.root={tmp_path / 'none'}", f"output={tmp_path / 'out'}"]
    given += [f"vae={inputs / 'vae'}"] if module is prepare else []
    assert message in fails(module, capsys, *given)
    assert not (tmp_path / "out").exists() and not any((tmp_path / "none").iterdir())


def test_an_empty_folder_for_stage_3(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none/training: no such folder"):
        run("store", inputs, tmp_path / "out", **{"data.root": tmp_path / "none"})
    (tmp_path / "none" / "training").mkdir(parents=True)
    with pytest.raises(UserError, match=r"none/training/ep_start_end_ids\.npy: missing"):
        run("store", inputs, tmp_path / "out", **{"data.root": tmp_path / "none"})
    assert not (tmp_path / "out").exists()


def write_captioned(folder: Path) -> list[Path]:
    """Three videos of 60 frames of noise, and their captions."""
    files = [folder / f"{name}.mp4" for name in "abc"]
    for number, file in enumerate(files):
        frames = np.random.default_rng(number).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
        write_mp4(file, frames, 10)
    lines = [json.dumps({"video": file.name, "text": "go"}) for file in files]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return files


def test_a_video_cut_short_is_left_out_and_tried_again(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its index is whole, so that it opens; the place of the damage is named."""
    files = write_captioned(tmp_path / "videos")
    good = files[1].read_bytes()
    files[1].write_bytes(good[: len(good) // 2])
    out, given = tmp_path / "out", {"data.root": tmp_path / "videos"}
    run("latents", inputs, out, **given)
    assert "left out: " in capsys.readouterr().out
    said = (out / "skipped" / "train" / "b.txt").read_text()
    assert said.startswith(f"{files[1]}: cannot be read (truncated: frame ")
    assert [e.id for e in read_episodes(out, "train")] == ["a"]
    stamps = {file: file.stat().st_mtime_ns for file in (out / "latent_videos").rglob("*.safetensors")}
    files[1].write_bytes(good)
    run("latents", inputs, out, resume=True, **given)
    assert [e.id for e in read_episodes(out, "train")] == ["a", "b"]
    assert not list((out / "skipped").rglob("*.txt"))
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps, "finished ones are as they were"


def write_annotated(root: Path) -> Path:
    """VPP's layout: two episodes of each split."""
    for split in ("train", "val"):
        for name in ("0", "1"):
            video = f"videos/{split}/{name}/rgb.mp4"
            write_mp4(root / video, np.zeros((3, 32, 32, 3), np.uint8), 10)
            annotation = {"texts": ["lift"], "videos": [{"video_path": video}], "video_length": 3}
            file = root / "annotation" / split / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(annotation))
    return root


@pytest.mark.parametrize(
    "path", ["../../secret.mp4", "/etc/secret.mp4", "videos/../../secret.mp4"], ids=["up", "root", "through"]
)
def test_an_annotation_that_points_outside_is_refused(
    path: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The first one ends the preparation; a later one is left out, and named."""
    root = write_annotated(tmp_path / "vpp")
    write_mp4(tmp_path / "secret.mp4", np.zeros((3, 32, 32, 3), np.uint8), 10)
    outside = json.dumps({"texts": ["lift"], "videos": [{"video_path": path}], "video_length": 3})
    (root / "annotation" / "train" / "1.json").write_text(outside)
    given = ["data=vpp", f"data.root={root}", f"vae={inputs / 'vae'}"]
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare", *given, f"output={tmp_path / 'out'}"])
        prepare.main()
    note = (tmp_path / "out" / "skipped" / "train" / "1.txt").read_text()
    assert note == f"{root}: its files name {path}, outside the folder; this data set is not safe\n"
    assert [e.id for e in read_episodes(tmp_path / "out", "train")] == ["0"]
    (root / "annotation" / "train" / "0.json").write_text(outside)
    assert f"name {path}, outside the folder" in fails(prepare, capsys, *given, f"output={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


def vpp_without_words(root: Path) -> str:
    file = write_annotated(root) / "annotation" / "train" / "1.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"texts": [" "]}))
    return f"{file}: has no caption; stage 1 needs texts"


def rlds_without_words(root: Path) -> str:
    picture = encode_picture(np.zeros((32, 32, 3), np.uint8), "PNG")
    features = {"observation": features_dict(image=image(32, 32, "png")), "language_instruction": text()}
    said, silent = (
        {"steps/observation/image": [picture] * 3, "steps/language_instruction": [words] * 3}
        for words in (b"lift", b" ")
    )
    write_set(root.parent, features, {"train": [[said, silent]], "val": [[said]]}, name=root.name)
    return f"{root}/1.0.0: episode 000001 has no instruction"


def hdf5_without_words(root: Path) -> str:
    h5py = pytest.importorskip("h5py")
    root.mkdir()
    for name in ("0", "1", "2"):
        with h5py.File(root / f"{name}.h5", "w") as file:
            file["top"] = np.zeros((3, 32, 32, 3), np.uint8)
            if name != "1":
                file.attrs["language_instruction"] = "lift"
    return f"{root}: episode 1 has no instruction"


def calvin_without_words(root: Path) -> str:
    write_demonstrations(root, lengths=(12, 12))
    file = root / "training" / ANNOTATIONS
    annotation = np.load(file, allow_pickle=True).item()
    annotation["language"]["ann"][1] = None
    np.save(file, annotation)
    shutil.copytree(root / "training", root / "validation")
    return f"{file}: the text of span 1 (frames 112 to 123) is None; expected is one text in UTF-8"


def captions_without_words(root: Path) -> str:
    write_captioned(root)
    lines = [
        json.dumps({"video": f"{name}.mp4", "text": text})
        for name, text in zip("abc", ["go", "\u200b", "go"])
    ]
    (root / "captions.jsonl").write_text("\n".join(lines))
    return f"{root}/b.mp4: its caption is blank"


@pytest.mark.parametrize(
    ("source", "write"),
    [
        ("calvin", calvin_without_words),
        ("videos data.captions=captions.jsonl", captions_without_words),
        ("vpp", vpp_without_words),
        ("rlds data.fps=5", rlds_without_words),
        ("hdf5 data.cameras=[top] data.fps=5", hdf5_without_words),
    ],
    ids=["calvin", "captions", "vpp", "rlds", "hdf5"],
)
def test_an_episode_without_caption_is_left_out(
    source: str, write: Callable[[Path], str], inputs: Path, tmp_path: Path
) -> None:
    said = write(tmp_path / "data")
    given = [f"data.root={tmp_path / 'data'}", f"vae={inputs / 'vae'}", f"output={tmp_path / 'out'}"]
    given += [f"data.index={tmp_path / 'index'}"] if "rlds" in source else []
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare", *f"data={source}".split(), *given])
        prepare.main()
    (note,) = (tmp_path / "out" / "skipped" / "train").iterdir()
    assert note.read_text() == f"{said}\n"
    assert len(read_episodes(tmp_path / "out", "train")) == 1


def rlds_of_two_sizes(root: Path) -> str:
    small, large = (encode_picture(np.zeros((n, 32, 3), np.uint8), "PNG") for n in (32, 48))
    features = {"observation": features_dict(image=image(32, 32, "png")), "language_instruction": text()}
    good, bad = (
        {"steps/observation/image": pictures, "steps/language_instruction": [b"lift"] * 3}
        for pictures in ([small] * 3, [small, small, large])
    )
    write_set(root.parent, features, {"train": [[good, bad]], "val": [[good]]}, name=root.name)
    file = root / "1.0.0" / f"{root.name}-train.tfrecord-00000-of-00001"
    place = "episode 1, step 2: observation/image"
    return f"{file}: {place}: the pictures change their size here, from 32 x 32 to 48 x 32"


def hdf5_of_two_sizes(root: Path) -> str:
    h5py = pytest.importorskip("h5py")
    root.mkdir()
    for name in ("0", "1", "2"):
        pictures = [
            encode_picture(np.zeros((48 if name == "1" and i else 32, 32, 3), np.uint8), "PNG")
            for i in range(3)
        ]
        with h5py.File(root / f"{name}.h5", "w") as file:
            file.attrs["language_instruction"] = "lift"
            rows = file.create_dataset("top", (3,), h5py.vlen_dtype(np.uint8))
            for i, coded in enumerate(pictures):
                rows[i] = np.frombuffer(coded, np.uint8)
        (root / f"._{name}.h5").write_bytes(HIDDEN)
    return f"{root}/1.h5: picture 1 of top: the pictures change their size here, from 32 x 32 to 48 x 32"


def calvin_of_two_sizes(root: Path) -> str:
    write_demonstrations(root, lengths=(12, 12))
    file = root / "training" / frame_name(115)
    frame = dict(np.load(file)) | {"rgb_static": np.zeros((20, 30, 3), np.uint8)}
    file.write_bytes(encode_frame(frame))
    shutil.copytree(root / "training", root / "validation")
    return f"{root}/training/{file.name}: the pictures change their size here, from 20 x 20 to 20 x 30"


@pytest.mark.parametrize(
    ("source", "write"),
    [
        ("calvin data.every=1", calvin_of_two_sizes),
        ("rlds data.fps=5", rlds_of_two_sizes),
        ("hdf5 data.cameras=[top] data.fps=5", hdf5_of_two_sizes),
    ],
    ids=["calvin", "rlds", "hdf5"],
)
def test_an_episode_whose_pictures_change_their_size_is_left_out(
    source: str, write: Callable[[Path], str], inputs: Path, tmp_path: Path
) -> None:
    said = write(tmp_path / "data")
    given = [f"data.root={tmp_path / 'data'}", f"vae={inputs / 'vae'}", f"output={tmp_path / 'out'}"]
    given += [f"data.index={tmp_path / 'index'}"] if "rlds" in source else []
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare", *f"data={source}".split(), *given])
        prepare.main()
    (note,) = (tmp_path / "out" / "skipped" / "train").iterdir()
    assert note.read_text().startswith(f"{said} (height x width); ")
    assert len(read_episodes(tmp_path / "out", "train")) == 1


def test_hidden_files_and_marks_of_encoding(inputs: Path, tmp_path: Path) -> None:
    """What macOS leaves beside files, and some editors at their beginning, is none of the data."""
    root = write_annotated(tmp_path / "vpp")
    for file in [*root.rglob("*.json"), *root.rglob("*.mp4")]:
        file.with_name(f"._{file.name}").write_bytes(HIDDEN)
    file = root / "annotation" / "train" / "1.json"
    values = json.loads(file.read_text())
    values |= {"texts": [["lift"], ""], "videos": values["videos"][0]}
    file.write_text(json.dumps(values), encoding="utf-8-sig")
    assert [(e.texts, len(e.videos)) for e in read_episodes(root, "train")] == [(["lift"], 1)] * 2
    files = [tmp_path / "videos" / name for name in ("a.mp4", "._a.mp4", ".trash/b.mp4")]
    for file in files:
        write_mp4(file, np.zeros((3, 32, 32, 3), np.uint8), 10)
    assert len(open_dataset({"format": "videos", "root": str(tmp_path / "videos")}, "all")) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"video": "a.mp4", "text": "Tür"}'.encode("latin-1"),
            "cannot be read ('utf-8' codec can't decode byte 0xfc in position 29",
        ),
        (
            '{"video": "a.mp4", "text": "Tür"}'.encode("utf-16"),
            "cannot be read ('utf-8' codec can't decode byte 0xff in position 0",
        ),
        (b'{"video": "a.mp4", "text": 3}', "entry 1: the caption is 3; expected is one text in UTF-8"),
        (b'{"video": "a.mp4", "text": "T\\udcfcr"}', "entry 1: the caption is not UTF-8"),
    ],
)
def test_captions_that_are_no_text(
    content: bytes, said: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "captions.jsonl").write_bytes(content)
    given = [
        "data=videos",
        "data.captions=captions.jsonl",
        f"data.root={tmp_path}",
        f"vae={inputs / 'vae'}",
        f"output={tmp_path / 'out'}",
    ]
    assert f"{tmp_path}/captions.jsonl: {said}" in fails(prepare, capsys, *given)


@pytest.mark.parametrize("spans", ["annotated", "recordings"])
def test_stage_2_leaves_spans_without_words_out(
    spans: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = calvin_without_words(tmp_path / "calvin")
    language = spans == "annotated"
    section = {"format": "calvin", "root": str(tmp_path / "calvin"), "spans": spans, "cameras": None}
    pairs = build_pairs(section, 14)
    found = [pairs.clip(number)[0].text(0) for number in range(len(pairs.lengths))]
    assert found == (["do thing 0"] if language else ["", ""])
    told = f"1 of 2 annotated spans have no instruction: left out; the first: {said}\n"
    assert capsys.readouterr().out.endswith(told if language else "")


def test_samples_to_look_at_may_be_damaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Held-out pairs across a change of size, say: the others are looked at."""
    calvin_of_two_sizes(tmp_path)
    section = {"format": "calvin", "root": str(tmp_path), "spans": "recordings", "distance": [2, 2]}
    pairs = build_pairs(section, 14)
    read = dict(readable(pairs.sample, range(len(pairs))))
    assert 0 < len(pairs) - len(read) < len(read)
    told = f"left out: {len(pairs) - len(read)} of {len(pairs)} samples to look at; the first: "
    assert capsys.readouterr().out.startswith(told)
    with pytest.raises(UserError, match="change their size"):
        list(readable(pairs.sample, [pair for pair in range(len(pairs)) if pair not in read]))


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """Not every library opens it."""
    name = os.fsdecode(b"gr\xfcn.mp4")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"n\.mp4: its name is not UTF-8, .*rename it"):
        open_dataset({"format": "videos", "root": str(tmp_path)})


def test_a_damaged_record_is_named_and_the_other_files_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = write_videos(tmp_path, {"train": [[3, 3], [3, 3], [3, 3]]})
    files = sorted((toy / "1.0.0").glob("*tfrecord*"))
    good = files[1].read_bytes()
    start = list(read_records(files[1]))[1][1] - 12
    read: list[int] = []

    def scan(shard: Path, *args, _scan=dataset._scan, **named):
        read.append(files.index(shard))
        return _scan(shard, *args, **named)

    monkeypatch.setattr(dataset, "READERS", 1)
    monkeypatch.setattr(dataset, "_scan", scan)
    for damaged, message in (
        (good[:-40], "truncated"),
        (good[: start + 50] + b"?" + good[start + 51 :], "wrong checksum"),
    ):
        files[1].write_bytes(damaged)
        with pytest.raises(UserError, match=rf"00001-of-00003: record 1 at byte {start}.*{message}"):
            RLDSDataset(toy, index=tmp_path / "index")
    files[1].write_bytes(good)
    assert RLDSDataset(toy, index=tmp_path / "index").lengths.tolist() == [3] * 6
    assert read.count(0) == 1 and read.count(1) == 3 and read.count(2) <= 2
    assert not any((tmp_path / "index").glob("*-parts")), "what was found lies in the index now"


@pytest.mark.parametrize("room", range(6))
def test_a_full_disk_while_rlds_is_indexed(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = write_videos(tmp_path, {"train": [[3], [3]]})
    files, write, save = iter(range(room)), dataset.write_file, np.save

    def take(path: Path | str) -> None:
        if next(files, None) is None:
            raise OSError(28, "No space left on device", str(path))

    def limited(path: Path, content: bytes | str) -> None:
        take(path)
        write(path, content)

    def limited_save(file: BinaryIO, array: np.ndarray) -> None:
        take(file.name)
        save(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_file", limited)
        patch.setattr(np, "save", limited_save)
        with pytest.raises(
            UserError, match=r"index/.*: No space left on device; free some space, or set data\.index"
        ):
            RLDSDataset(toy, index=tmp_path / "index")
    assert RLDSDataset(toy, index=tmp_path / "index").lengths.tolist() == [3, 3]


def test_a_fault_of_a_reader_itself_can_be_found() -> None:
    """It looks like a damaged file to the user; who debugs it sees where it was raised."""
    with (
        pytest.raises(UserError, match="a.json: cannot be read .*; copy it again") as caught,
        reading("a.json", "copy it again"),
    ):
        missing_name  # noqa: B018, F821
    assert isinstance(caught.value.__cause__, NameError)
