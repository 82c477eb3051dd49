"""Stage 1's preparation from every source, restarts, damage; latents in old files."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from benchmarks.rlds_writer import write_videos
from defi.data import open_dataset
from defi.data.episode import Episode, distinct, file_name, of_part
from defi.data.videos import VideoData, read_captions
from defi.errors import UserError
from defi.picture import encode_picture
from defi.video import number_video, read_frames, write_mp4
from Step1_GFDM import prepare
from Step1_GFDM.config import GFDMConfig, VAESizes
from Step1_GFDM.data import LatentSet, LatentSetConfig, read_episodes, read_latents, stored_step
from Step1_GFDM.pipeline import build_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers writes it, half the side of a picture to a latent."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    build_vae(VAESizes([32, 32], 1), 16).save_pretrained(folder)
    return folder


def run(module: Any, *settings: str) -> int:
    """Exit code of a command, run in this process."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *settings])
        try:
            module.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def data_of(source: str, root: Path) -> list[str]:
    captions = ["data.captions=captions.jsonl"] if source == "videos" else []
    return [f"data={source}", f"data.root={root}", *captions]


def prepared(source: str, root: Path, vae: Path, *settings: str) -> Path:
    output = root.parent / f"{root.name}_latents"
    given = [*data_of(source, root), f"vae={vae}", f"output={output}", "batch=4"]
    assert run(prepare, *given, *settings) == 0
    return output


def video(path: Path, frames: int, shade: int = 0, fps: int = 10) -> None:
    """Frame i has the shade `shade` + 8 i."""
    ramp = (shade + 8 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    write_mp4(path, np.broadcast_to(ramp, (frames, 32, 32, 3)).copy(), fps)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos, one of them broken, and their captions."""
    root = tmp_path / "videos"
    video(root / "kitchen" / "1.mp4", 6, shade=10)
    video(root / "kitchen" / "2.mp4", 9, shade=90)
    (root / "broken.mp4").write_bytes(b"no video at all")
    lines = [
        {"video": "kitchen/1.mp4", "text": "open the drawer"},
        {"video": "broken.mp4", "text": "break"},
        {"video": "kitchen/2.mp4", "texts": ["push it", "push the block"]},
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


# ------------------------------------------------------------ sources


def test_a_folder_of_videos_and_captions(
    videos: Path, vae: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, convert = [], prepare.prepare_frames
    monkeypatch.setattr(prepare, "prepare_frames", lambda f, s: encoded.append(len(f)) or convert(f, s))
    output = prepared("videos", videos, vae, "data.every=2")
    printed = capsys.readouterr().out
    assert (
        "broken.mp4: cannot be read" in printed
        and "1 episodes in train; 1 left out" in printed
        and "2 episodes in val\n" in printed
    )
    (train,), (again, val) = read_episodes(output, "train"), read_episodes(output, "val")
    assert (train.id, train.texts, train.frames) == ("kitchen_1", ["open the drawer"], 3)
    assert (val.id, val.texts, val.frames) == ("kitchen_2", ["push it"], 5)
    assert (again.id, again.texts, again.frames) == ("kitchen_2-2", ["push the block"], 5)
    assert encoded == [3, 5], "what is said twice is encoded once"
    assert (output / again.latents[0]).read_bytes() == (output / val.latents[0]).read_bytes()
    stored = output / train.videos[0]
    assert number_video(stored).fps(stored) == pytest.approx(5) and number_video(stored).frames == 3
    np.testing.assert_allclose(read_frames(stored)[:, 16, 16, 0], [10, 26, 42], atol=4)
    assert read_latents(output / train.latents[0], np.arange(3)).shape == (3, 4, 8, 8)
    assert "broken.mp4" in (output / "skipped" / "train" / "broken.txt").read_text()
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["data"]["root"] == str(videos) and manifest["data"]["every"] == 2
    assert manifest["videos"]["codec"] == "libx264" and manifest["image_size"] == 16
    assert len(manifest["vae"]) == 16
    spread = LatentSetConfig(str(output), clips="spread", cameras=[1.0])
    clips = LatentSet(spread, GFDMConfig(frames=3), "train")
    assert clips.clip(0, np.random.default_rng(0))["text"] == "open the drawer"


def test_captions_as_a_table_and_as_something_something_has_them(tmp_path: Path, vae: Path) -> None:
    root = tmp_path / "sthv2"
    video(root / "clips" / "11.webm.mp4", 3)
    (root / "clips" / "11.webm.mp4").rename(root / "clips" / "11.webm")
    video(root / "clips" / "12.mp4", 3)
    (root / "clips" / "12.mp4").rename(root / "clips" / "12.webm")
    labels = [
        {"id": "11", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]}
    ]
    (root / "train.json").write_text(json.dumps(labels))
    (root / "val.csv").write_text('video,text\n12.webm,"pushing a pen, slowly"\n')
    output = prepared(
        "videos", root, vae, "data.videos=clips", "data.split=train.json", "data.held_out=val.csv"
    )
    assert read_episodes(output, "train")[0].texts == ["holding a cup"]
    assert read_episodes(output, "val")[0].texts == ["pushing a pen, slowly"]


def test_longer_videos_are_left_out(videos: Path, vae: Path) -> None:
    video(videos / "3.mp4", 4)
    (videos / "captions.jsonl").write_text(
        '{"video": "kitchen/1.mp4", "text": "a"}\n{"video": "kitchen/2.mp4", "text": "b"}\n'
        '{"video": "3.mp4", "text": "c"}\n'
    )
    output = prepared("videos", videos, vae, "data.longest=8")
    assert [e.id for e in read_episodes(output, "train")] == ["kitchen_1"]
    assert [e.texts for e in read_episodes(output, "val")] == [["c"]]


@pytest.mark.parametrize("held_out", ["val", "val.csv"])
def test_held_out_videos_are_not_trained_on(held_out: str, tmp_path: Path) -> None:
    """Also where they alone are named, below the root, as a folder or by their captions."""
    for name in ("train/1.mp4", "val/2.mp4"):
        video(tmp_path / name, 3)
    (tmp_path / "val.csv").write_text("video,text\nval/2.mp4,go\n")
    given = {"format": "videos", "root": str(tmp_path), "held_out": held_out}
    training, held = (open_dataset(given, part) for part in ("training", "held_out"))
    assert [training.episode(number).name for number in range(len(training))] == ["train_1"]
    assert len(held) == 1 and held.episode(0).name.endswith("2")
    assert training.left_out == ["1 episodes of the other part (data.split, data.held_out)"]


def test_captions_of_one_video_stay_together(videos: Path, vae: Path) -> None:
    """What is held out is held out under all its captions, however its path is spelled."""
    (videos / "captions.jsonl").write_text(
        '{"video": "kitchen/2.mp4", "text": "a"}\n{"video": "kitchen/1.mp4", "text": "b"}\n'
        '{"video": "./kitchen/2.mp4", "text": "c"}\n{"video": "kitchen/2.mp4", "text": "d"}\n'
    )
    output = prepared("videos", videos, vae)
    assert {e.texts[0] for e in read_episodes(output, "train")} == {"a", "c", "d"}
    assert [e.texts for e in read_episodes(output, "val")] == [["b"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", "\ufeffvideo,text\nkitchen/1.mp4,go\n"),
        ("UPPER.CSV", "video,text\nkitchen/1.mp4,go\n"),
        ("bom.jsonl", '\ufeff{"video": "kitchen/1.mp4", "text": "go"}'),
        ("one.jsonl", '{"video": "kitchen/1.mp4", "texts": "go"}'),
        ("bom.json", '\ufeff[{"id": "1", "label": "go"}]'),
    ],
)
def test_captions_as_programs_write_them(videos: Path, name: str, content: str) -> None:
    """With a byte order mark, a suffix in capitals, a text that stands alone."""
    (videos / name).write_text(content, encoding="utf-8")
    ((_, text),) = read_captions(videos / name)
    assert text == "go"


def test_a_path_too_long_for_a_name_is_shortened(videos: Path, vae: Path) -> None:
    deep = "/".join(["ordner_mit_ü" * 5] * 6)
    video(videos / deep / "1.mp4", 3)
    video(videos / deep / "2.mp4", 4)
    (videos / "captions.csv").write_text(f"video,text\n{deep}/1.mp4,go\n{deep}/2.mp4,come\n")
    output = prepared("videos", videos, vae, "data.split=captions.csv", "data.held_out=captions.csv")
    first, second = sorted(read_episodes(output, "train"), key=lambda episode: episode.frames)
    assert first.texts == ["go"] and second.texts == ["come"] and first.id[:150] == second.id[:150]


def test_vpp_layout_without_latents(tmp_path: Path, vae: Path) -> None:
    root = tmp_path / "vpp"
    for split, frames in (("train", 5), ("val", 4)):
        names = []
        for camera, shade in (("static", 20), ("gripper", 120)):
            names.append(f"videos/{split}/7/{camera}.mp4")
            video(root / names[-1], frames, shade)
        annotation = {
            "texts": ["lift"],
            "videos": [{"video_path": name} for name in names],
            "state": [[0]] * frames,
        }
        (root / "annotation" / split).mkdir(parents=True)
        (root / "annotation" / split / "7.json").write_text(json.dumps(annotation))
    output = prepared("vpp", root, vae)
    (episode,) = read_episodes(output, "train")
    assert (episode.frames, episode.texts) == (5, ["lift"])
    assert [Path(path).name for path in episode.latents] == ["static.safetensors", "gripper.safetensors"]
    shades = [read_frames(output / path)[0, 0, 0, 0] for path in episode.videos]
    np.testing.assert_allclose(shades, [20, 120], atol=4)


def write_vpp(root: Path, split: str, name: str, videos: list[str], changes: Mapping[str, Any] = {}) -> Path:
    """An annotation and its videos."""
    for number, path in enumerate(videos):
        video(root / path, 4, shade=20 + 100 * number)
    annotation = {"texts": ["lift"], "videos": [{"video_path": path} for path in videos], **changes}
    file = root / "annotation" / split / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(annotation))
    return file


def test_vpp_videos_of_one_name_are_all_kept(tmp_path: Path, vae: Path) -> None:
    root = tmp_path / "vpp"
    for split in ("train", "val"):
        write_vpp(root, split, "7", [f"videos/{split}/7/{camera}/rgb.mp4" for camera in (0, 1)])
    output = prepared("vpp", root, vae)
    (episode,) = read_episodes(output, "train")
    assert [Path(path).name for path in episode.latents] == ["0.safetensors", "1.safetensors"]
    shades = [read_frames(output / path)[0, 0, 0, 0] for path in episode.videos]
    np.testing.assert_allclose(shades, [20, 120], atol=4)


def test_steps_between_stored_frames_multiply(videos: Path, vae: Path) -> None:
    """Of videos that lack frames of the recording already; clips are cut in steps of the recording."""
    output = prepared("vpp", prepared("videos", videos, vae, "data.every=2"), vae, "data.every=2")
    assert stored_step(output) == 4
    assert [episode.frames for episode in read_episodes(output, "val")] == [3, 3]  # of nine


def test_of_several_texts_in_vpps_layout_the_first_counts(
    tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture
) -> None:
    """As the published loader takes them; what is passed over is said."""
    root = tmp_path / "vpp"
    for split in ("train", "val"):
        write_vpp(root, split, "7", [f"videos/{split}/7/rgb.mp4"], {"texts": ["lift", "raise"]})
    assert read_episodes(prepared("vpp", root, vae), "train")[0].texts == ["lift"]
    assert "1 of 1 annotations have several texts: the first counts" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [4, 3])
def test_actions_in_vpps_layout(rows: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Read where each frame has one; no frame is lost where one has none."""
    values = np.arange(2 * rows).reshape(rows, 2).tolist()
    write_vpp(tmp_path, "train", "7", ["videos/rgb.mp4"], {"actions": values, "state": [[5]] * 4})
    data = open_dataset({"format": "vpp", "root": str(tmp_path)})
    assert data.lengths.tolist() == [4] and data.state_names == ("state_0",)
    if rows == 4:
        assert data.motions.actions.tolist() == values and data.motions.state.tolist() == [[5.0]] * 4
    else:
        assert data.action_names == ()
        assert "action is not read: not every frame has a row of it" in capsys.readouterr().out


def test_an_annotation_of_a_long_name(tmp_path: Path, vae: Path) -> None:
    root = tmp_path / "vpp"
    for split in ("train", "val"):
        write_vpp(root, split, "i" * 248, [f"videos/{split}/7/rgb.mp4"])
    assert read_episodes(prepared("vpp", root, vae), "train")[0].id.startswith("i" * 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": []}, "0.json: has no caption"),
        ({"videos": []}, "0.json: names no videos"),
        ({"video_length": float("inf")}, "0.json: video_length=inf: no video is that long"),
        ({"video_length": 10**30}, "0.json: video_length=1000"),
        ({"video_length": -3}, "0.json: video_length=-3"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_damaged_annotation_is_left_out_wherever_it_stands(
    changes: dict[str, Any], message: str, tmp_path: Path, vae: Path
) -> None:
    """Even where it is the first."""
    root = tmp_path / "vpp"
    for split in ("train", "val"):
        for name in ("0", "1"):
            write_vpp(root, split, name, [f"videos/{split}/{name}/rgb.mp4"])
    write_vpp(root, "train", "0", ["videos/train/0/rgb.mp4"], changes)
    output = prepared("vpp", root, vae)
    assert [e.id for e in read_episodes(output, "train")] == ["1"]
    assert message in (output / "skipped" / "train" / "0.txt").read_text()


def test_rlds(tmp_path: Path, vae: Path) -> None:
    root = write_videos(tmp_path, {"train": [[5, 4]], "val": [[3]]})
    output = prepared("rlds", root, vae, f"data.index={tmp_path / 'index'}", "data.every=2", "data.fps=5")
    episodes = read_episodes(output, "train")
    assert [(e.id, e.frames, e.texts) for e in episodes] == [
        ("000000", 3, ["do thing 0"]),
        ("000001", 2, ["do thing 1"]),
    ]
    assert read_episodes(output, "val")[0].texts == ["do thing 2"]


def test_rlds_without_a_rate_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Before the autoencoder is opened, which is not there."""
    root = write_videos(tmp_path, {"train": [[5, 4]], "val": [[3]]})
    given = [f"data.root={root}", f"vae={tmp_path / 'none'}", f"output={tmp_path / 'out'}"]
    assert run(prepare, "data=rlds", *given) == 2
    assert "does not say its frames per second; give data.fps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_held_out_of_videos_without_captions(videos: Path, vae: Path) -> None:
    """Stage 1 cannot be trained on them; stage 2 and the autoencoder take them all."""
    section = {"format": "videos", "root": str(videos / "kitchen")}
    for part in ("training", "held_out", "all"):
        assert open_dataset(section, part).lengths.tolist() == [6, 9]
    given = ["data=videos", f"data.root={videos / 'kitchen'}", f"output={videos.parent / 'out'}"]
    assert run(prepare, *given, f"vae={vae}") == 2


def test_hdf5_with_raw_and_with_encoded_pictures(tmp_path: Path, vae: Path) -> None:
    h5py = pytest.importorskip("h5py")
    root = tmp_path / "aloha"
    root.mkdir()
    frames = np.zeros((5, 20, 30, 3), np.uint8)
    frames[...] = (20 * np.arange(5))[:, None, None, None]
    frames[:, :, :10] = 250  # to be cropped away
    coded = [encode_picture(frame, "JPEG") for frame in frames]
    for name in ("one", "two"):
        with h5py.File(root / f"{name}.hdf5", "w") as file:
            file["observations/images/raw"] = frames
            padded = np.zeros((5, max(map(len, coded)) + 9), np.uint8)
            for row, code in zip(padded, coded):
                row[: len(code)] = np.frombuffer(code, np.uint8)
            file["observations/images/jpeg"] = padded
            rows = file.create_dataset("observations/images/rows", (5,), h5py.vlen_dtype(np.uint8))
            for i, code in enumerate(coded):
                rows[i] = np.frombuffer(code, np.uint8)
            file.attrs["language_instruction"] = f"fold {name}"
    cameras = ", ".join(f"{camera}:observations/images/{camera}" for camera in ("raw", "jpeg", "rows"))
    crop = "data.crop={raw: [0, 10, 20, 20], jpeg: [0, 10, 20, 20]}"
    output = prepared("hdf5", root, vae, f"data.cameras=[{cameras}]", crop, "data.pad=true", "data.every=2")
    (episode,) = read_episodes(output, "train")
    assert (episode.id, episode.texts, episode.frames) == ("one", ["fold one"], 3)
    raw, jpeg, rows = (read_frames(output / path) for path in episode.videos)
    assert raw.shape == jpeg.shape == (3, 20, 20, 3) and rows.shape == (3, 30, 30, 3)
    for seen in (raw, jpeg, rows[:, 5:25, 12:]):
        np.testing.assert_allclose(seen[:, 10, 10, 0], [0, 40, 80], atol=5)
    assert rows[0, 2].max() < 12 and rows[0, 15, 3, 0] > 230, (
        "black borders above and below, the picture between"
    )


def test_hdf5_with_several_episodes_in_a_file(tmp_path: Path, vae: Path) -> None:
    h5py = pytest.importorskip("h5py")
    root = tmp_path / "robomimic"
    root.mkdir()
    with h5py.File(root / "lift.hdf5", "w") as file:
        for i in range(3):
            file[f"data/demo_{i}/obs/agentview_image"] = np.full((2 + i, 16, 16, 3), 50 * i, np.uint8)
    (root / "cut.hdf5").write_bytes((root / "lift.hdf5").read_bytes()[:700])
    settings = [
        "data.groups=data",
        "data.cameras=[static:obs/agentview_image]",
        "data.instruction=lift the cube",
    ]
    output = prepared("hdf5", root, vae, *settings)
    assert [e.id for e in read_episodes(output, "train")] == ["lift-data-demo_0", "lift-data-demo_1"]
    assert [(e.id, e.frames) for e in read_episodes(output, "val")] == [("lift-data-demo_2", 4)]
    (note,) = (output / "skipped" / "train").iterdir()
    assert "cut.hdf5: cannot be read" in note.read_text()


def write_teleoperation(root: Path, *names: str) -> Path:
    """Episodes of two cameras, one dark, one bright."""
    h5py = pytest.importorskip("h5py")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(root / f"{name}.hdf5", "w") as file:
            for camera, shade in (("dark", 10), ("bright", 200)):
                file[camera] = np.full((3, 20, 24, 3), shade, np.uint8)
    return root


TELEOPERATION = ["data.instruction=fold", "data.fps=30", "data.cameras=[top:dark]"]


def test_hdf5_in_folders_that_are_links(tmp_path: Path, vae: Path) -> None:
    """Each once, under the name that it has in the folder itself, and without going round in circles."""
    root = write_teleoperation(tmp_path / "here", "day1/one")
    write_teleoperation(tmp_path / "there", "two")
    (root / "day0").symlink_to(root / "day1")
    (root / "day2").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "again").symlink_to(root)
    output = prepared("hdf5", root, vae, *TELEOPERATION)
    found = [e.id for split in ("train", "val") for e in read_episodes(output, split)]
    assert found == ["day1-one", "day2-two"]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("[0, 0, 0, 10]", "data.crop.top=[0, 0, 0, 10]: give one of the cameras (top)"),
        ("[0, 0, 10]", "data.crop.top=[0, 0, 10]: give one of the cameras (top)"),
        ("5", "data.crop.top=5: "),
        ("[100, 0, 10, 10]", "no episode of train could be read"),
    ],
)
def test_a_crop_outside_the_picture(
    box: str, message: str, tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture
) -> None:
    root = write_teleoperation(tmp_path / "aloha", "one", "two")
    given = ["data=hdf5", f"data.root={root}", f"vae={vae}", f"output={tmp_path / 'out'}"]
    assert run(prepare, *given, *TELEOPERATION, f"data.crop={{top: {box}}}") == 2
    said = capsys.readouterr()
    assert message in said.err
    if "episode" in message:
        assert f"{root}/one.hdf5: data.crop.top={box} leaves its pictures of 20 x 24 pixels" in said.out


def test_hdf5_links_out_of_the_file_are_not_followed(
    tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture
) -> None:
    h5py = pytest.importorskip("h5py")
    root = tmp_path / "links"
    root.mkdir()
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["pictures"] = np.zeros((3, 16, 16, 3), np.uint8)
    with h5py.File(root / "episode.h5", "w") as file:
        file["pictures"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/pictures")
    common = [f"data.root={root}", f"vae={vae}", f"output={tmp_path / 'out'}", "data.instruction=go"]
    assert run(prepare, "data=hdf5", *common, "data.cameras=[static:pictures]") == 2
    assert "leads out of the file" in capsys.readouterr().err


# ------------------------------------------------------------ restarts and damage


def test_a_long_recording_is_read_in_parts(
    tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole batches, as if it were read at once; damage further on leaves no half of a file."""
    root = tmp_path / "videos"
    for name in ("good", "bad"):
        frames = np.random.default_rng(0).integers(0, 256, (85, 32, 48, 3), np.uint8)
        write_mp4(root / f"{name}.mp4", frames, 10)
    (root / "captions.csv").write_text("video,text\ngood.mp4,go\nbad.mp4,stop\ngood.mp4,come\n")
    read, counts = VideoData.read, []

    def damaged(self: VideoData, episode: Episode, positions: range, cameras: list[str]) -> dict:
        counts.append(len(positions))
        if episode.name == "bad" and 84 in positions:
            raise UserError("bad.mp4: broken")
        return read(self, episode, positions, cameras)

    monkeypatch.setattr(VideoData, "read", damaged)
    given = ["data.split=captions.csv", "data.held_out=captions.csv", "data.every=2"]
    whole = prepared("videos", root, vae, *given, "batch=50").rename(tmp_path / "whole")
    assert set(counts) == {43}
    counts.clear()
    parts = prepared("videos", root, vae, *given, "batch=9")
    assert set(counts) == {27, 16}, "whole batches"
    files = {file.relative_to(whole) for file in whole.rglob("*") if file.is_file()}
    assert files == {file.relative_to(parts) for file in parts.rglob("*") if file.is_file()}
    assert len(files) == 1 + 2 * (2 * 3 + 1)
    for file in files:
        one, other = whole / file, parts / file
        if file.suffix == ".safetensors":  # batches of other sizes may round differently
            every = np.arange(43)
            assert torch.allclose(read_latents(one, every), read_latents(other, every), atol=1e-2)
        elif file.suffix == ".mp4":  # an encoder that shares its processors may choose other bytes
            assert read_frames(one).shape == read_frames(other).shape == (43, 32, 48, 3)
        elif file.name != "manifest.json":
            assert one.read_bytes() == other.read_bytes(), file


def test_a_killed_preparation_goes_on_and_redoes_nothing(
    videos: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = videos.parent / "videos_latents"
    settings = [*data_of("videos", videos), f"vae={vae}", f"output={output}"]
    write, written = prepare.write_episode, []

    def dies(output: Path, name: str, *args: Any) -> None:
        written.append(name)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(output, name, *args)

    monkeypatch.setattr(prepare, "write_episode", dies)
    assert run(prepare, *settings) == 130
    assert run(prepare, *settings) == 2, "the folder exists"
    video(videos / "broken.mp4", 4)  # mended meanwhile
    assert run(prepare, *settings, "resume=true") == 0
    assert written == ["kitchen_1", "kitchen_2", "broken", "kitchen_2", "kitchen_2-2"]
    assert len(read_episodes(output, "train")) == 2 and not list((output / "skipped").rglob("*.txt"))
    assert run(prepare, *settings, "resume=true", "image_size=32") == 2, "another size than it was begun with"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("data.cameras=[top:bright]", "begun with data.cameras=['top:dark'], now ['top:bright']"),
        ("data.crop={top: [0, 0, 9, 9]}", "begun with data.crop=None, now {'top': [0, 0, 9, 9]}"),
        ("data.pad=true", "begun with data.pad=False, now True"),
        ("data.instruction=unfold", "begun with data.instruction=fold, now unfold"),
        ("data.fps=7", "begun with data.fps=30.0, now 7.0"),
        ("data.every=2", "begun with data.every=1, now 2"),
        ("data.root={other}", "begun with data.root={root}, now {other}"),
    ],
)
def test_a_preparation_goes_on_with_the_same_settings_only(
    changed: str, message: str, tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture
) -> None:
    root, other = (write_teleoperation(tmp_path / name, "one", "two") for name in ("aloha", "other"))
    prepared("hdf5", root, vae, *TELEOPERATION)
    given = ["data=hdf5", f"data.root={root}", f"vae={vae}", f"output={root}_latents"]
    assert run(prepare, *given, *TELEOPERATION, "resume=true", changed.replace("{other}", str(other))) == 2
    told = message.replace("{root}", str(root)).replace("{other}", str(other))
    assert f"manifest.json: {told}; choose another output=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.every=0", "data.every=0: must be at least 1"),
        ("data.every=1.5", "data.every=1.5: "),
        ("data.fps=fast", "data.fps=fast: "),
        ("data.fps=0", "data.fps=0.0: must be a number of frames per second"),
        ("data.crop=5", "data.crop=5: "),
        ("data.cameras=top", "data.cameras=top: must be a list"),
        ("data.longest=0", "data.longest=0: must be at least 1"),
        ("data.splits=null", "data.splits=: no longer a setting; use data.split, data.held_out"),
        ("data.splits.train=null", "=: no longer a setting; use data.split, data.held_out"),
        ("data.text=label", "data.text=: no longer a setting; use data.language"),
        ("data.source=vhs", "data.source=: no longer a setting; use data.format"),
        ("data=captioned_hdf5", "data=captioned_hdf5: no longer a choice; write data=hdf5"),
        ("data=frames", "data=frames: no longer a choice; write data=calvin, or another format"),
        ("data.format=vhs", "data.format=vhs: choose from calvin"),
        ("batch=0", "batch=0: must be a whole number"),
        ("image_size=-1", "image_size=-1: must be a whole number"),
    ],
)
def test_settings_that_cannot_be(
    setting: str, message: str, tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture
) -> None:
    root = write_teleoperation(tmp_path / "aloha", "one", "two")
    given = ["data=hdf5", f"data.root={root}", f"vae={vae}", f"output={tmp_path / 'out'}"]
    assert run(prepare, *given, *TELEOPERATION, setting) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_root_may_be_spelled_differently(
    videos: Path, vae: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = prepared("videos", videos, vae)
    monkeypatch.chdir(videos)
    given = ["data=videos", "data.captions=captions.jsonl", f"vae={vae}", f"output={output}", "resume=true"]
    for root in (".", f"{videos}/", f"{videos}/../videos"):
        assert run(prepare, *given, f"data.root={root}") == 0
    manifest = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "data"}))
    assert run(prepare, *given, f"data.root={videos}") == 2
    assert "begun with data.format=None, now videos; choose another output=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "captions.jsonl",
            '{"video": "a.mp4", "text": "x"}\n{"video": "b.mp4"}',
            "entry 2: a video or its caption",
        ),
        ("captions.jsonl", '{"video": "a.mp4", "text": "x"}\n{"video": ', "line 2: cannot be read"),
        ("captions.jsonl", '{"video": "../../etc/a.mp4", "text": "x"}', "outside the folder"),
        ("captions.jsonl", "", "no captions in it"),
        (
            "captions.csv",
            "file,words\na.mp4,x\n",
            "entry 1: a video or its caption is missing; give each as video and text",
        ),
        ("captions.csv", "video,text\na.mp4,\n", "no captions in it"),
        ("labels.json", '[{"id": "1"}]', "labels.json: cannot be read (no 'label' in it)"),
        ("labels.txt", "x", "captions are read from"),
        (None, "", "none.csv: missing"),
    ],
)
def test_bad_captions_are_named(
    tmp_path: Path, vae: Path, capsys: pytest.CaptureFixture, name: str | None, content: str, message: str
) -> None:
    if name is not None:
        (tmp_path / name).write_text(content)
    settings = [f"data.root={tmp_path}", f"data.captions={name or 'none.csv'}"]
    code = run(prepare, "data=videos", *settings, f"vae={vae}", f"output={tmp_path / 'out'}")
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_recordings() -> None:
    assert file_name("a/b c:d.é") == "a_b_c_d.é" and file_name("../..") == "_"
    assert distinct(["a", "b", "a"]) == ["a", "b", "a-2"]
    names = ["a", "a", "a-2", "A", "a", "a-2"]
    assert distinct(names) == ["a", "a-3", "a-2", "A", "a-4", "a-2-2"]


@pytest.mark.parametrize(("count", "held"), [(2, [1]), (20, [19]), (45, [19, 39])])
def test_every_twentieth_is_held_out(count: int, held: list[int]) -> None:
    items = list(range(count))
    assert of_part(items, "held_out") == held
    assert of_part(items, "training") == [i for i in items if i not in held]
    assert of_part(items, "all") == items and of_part([7], "held_out") == of_part([7], "training") == [7]


# ------------------------------------------------------------ old latents


def test_latents_in_files_of_torch(tmp_path: Path) -> None:
    """Those of PyTorch's old format too, value for value; what holds something else, or code, is named."""
    latents = torch.randn(7, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for new in (True, False):
        torch.save(latents, tmp_path / "0.pt", _use_new_zipfile_serialization=new)
        found = read_latents(tmp_path / "0.pt", np.array([5, 2, 6]))
        assert torch.equal(found, latents[[5, 2, 6]])
        with pytest.raises(UserError, match=r"0\.pt: cannot be read"):
            read_latents(tmp_path / "0.pt", np.array([7]))

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    for content in (torch.zeros(3), {"a": 1}, Evil()):
        for new in (True, False):
            torch.save(content, tmp_path / "0.pt", _use_new_zipfile_serialization=new)
            with pytest.raises(UserError, match=r"0\.pt: cannot be read"):
                read_latents(tmp_path / "0.pt", np.array([0]))
