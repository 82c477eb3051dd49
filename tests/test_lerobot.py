"""LeRobot's formats, read and written: frames by number, splits, the hub's cache, damage."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from killing import die_before
from policy_fakes import write_demonstrations

from defi.data import Dataset, convert, open_dataset
from defi.data.lerobot import rows
from defi.engine import output as output_folder
from defi.errors import UserError
from defi.video import VideoFile, timed_video, upright

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
from lerobot_fakes import (  # noqa: E402
    EPISODES,
    FPS,
    INFO,
    LENGTHS,
    ROWS,
    TASKS,
    VIDEO,
    Robot,
    as_v21,
    flat,
    write,
)

from defi.data.lerobot.write import LeRobotWriter  # noqa: E402

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lerobot")
    found = {kind: write(folder / kind, kind) for kind in ("images", "av1", "h264")}
    return found | {"v21": as_v21(found["h264"], folder / "v21")}


def opened(root: Path | str, part: Any = "all", **settings: Any) -> Dataset:
    return open_dataset({"format": "lerobot", "root": str(root), **settings}, part)


# ------------------------------------------------------------ what is read


def check_frames(data: Dataset, places: list[tuple[int, int]]) -> None:
    """Of some (episode, position): the pictures of both cameras."""
    for number, position in places:
        pictures = data.read(data.episode(number), [position, 0, position], data.cameras)
        for place, camera in enumerate(data.cameras):
            expected = flat(number, [position, 0, position]).astype(int) + place
            away = np.abs(pictures[camera].astype(int) - expected).max()
            assert pictures[camera].shape == expected.shape and away <= 6, (number, position, camera)


@pytest.mark.parametrize("kind", ["images", "av1", "h264", "v21"])
def test_lerobot_frames_by_number(kind: str, sets: dict[str, Path]) -> None:
    data, made = opened(sets[kind]), Robot()
    assert data.lengths.tolist() == list(LENGTHS) and (data.fps, data.cameras) == (FPS, ("top", "wrist"))
    assert (data.action_names, data.state_names) == (made.action_names, made.state_names)
    places = [(number, position) for number, length in enumerate(LENGTHS) for position in range(length)]
    check_frames(data, [places[i] for i in np.random.default_rng(0).permutation(len(places))])
    for number, length in enumerate(LENGTHS):
        episode = data.episode(number)
        assert [episode.text(n) for n in range(length)] == [
            made.episode(number).text(n) for n in range(length)
        ]
    rows = data.motions.rows(np.arange(sum(LENGTHS)))
    joined = np.concatenate([data.motions.actions[rows], data.motions.state[rows]], 1)
    assert np.array_equal(joined, made.read_motions(range(sum(LENGTHS))))


def test_lerobot_cameras_are_split_differently(sets: dict[str, Path]) -> None:
    """So that the test above shows something."""
    for kind, counts in (("av1", (1, 4, 4)), ("h264", (4, 1, 1)), ("images", (0, 0, 1))):
        folders = [sets[kind] / f"videos/observation.images.{camera}" for camera in ("top", "wrist")]
        assert tuple(len([*f.rglob("file-*")]) for f in (*folders, sets[kind] / "data")) == counts


@pytest.mark.parametrize("kind", ["images", "h264"])
def test_lerobot_is_read_by_processes_that_were_forked(kind: str, sets: dict[str, Path]) -> None:
    """With files open, and at the same time as their parent."""
    data = opened(sets[kind])
    places = [(number, position) for number in range(4) for position in range(5)] * 5
    check_frames(data, places[:3])
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=check_frames, args=(data, places[::step])) for step in (1, -1)]
    for worker in workers:
        worker.start()
    check_frames(data, places)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_lerobot_rows_of_an_episode_in_several_groups(sets: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(sets["images"], tmp_path / "copy"))
    pq.write_table(pq.read_table(root / ROWS), root / ROWS, row_group_size=5)
    data = opened(root)
    check_frames(data, [(1, 11), (0, 6), (3, 4), (2, 0)])
    expected = Robot().read_motions(range(sum(LENGTHS)))
    assert np.array_equal(np.concatenate([data.motions.actions, data.motions.state], 1), expected)


@pytest.mark.parametrize(("most", "kept"), [(2**28, 4), (170_000, 2), (1, 1)])
def test_lerobot_row_groups_are_kept_by_size(
    most: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 kB each; those that were asked for last, of which the newest is kept in any case."""
    pq.write_table(pa.table({"a": np.arange(60_000)}), file := tmp_path / "a.parquet", row_group_size=10_000)
    monkeypatch.setattr(rows, "KEPT_BYTES", most)
    monkeypatch.setattr(rows, "_kept", {})
    for group in (0, 1, 2, 3, 4, 0, 5):
        assert rows.read_rows(file, ["a"], 10_000 * group + 7, 1)["a"] == 10_000 * group + 7
    assert [key[2] for key in rows._kept] == [3, 4, 0, 5][-kept:]


ORDERS = {  # of frames that are shown in another order than they are decoded in, and far from key frames
    "h264.mp4": ("libx264", {"bf": "3", "g": "12"}),
    "pyramid.mp4": ("libx264", {"bf": "7", "g": "250", "b-pyramid": "normal"}),
    "open.mkv": ("libx264", {"bf": "3", "g": "9", "x264-params": "open-gop=1"}),
    "h265.mp4": ("libx265", {"bf": "4", "g": "20", "x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "15", "lag-in-frames": "8", "auto-alt-ref": "1"}),
    "mpeg4.mp4": ("mpeg4", {"bf": "2", "g": "10"}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_timed_frames_are_those_that_decoding_from_the_start_shows(name: str, tmp_path: Path) -> None:
    codec, options = ORDERS[name]
    path, rng = tmp_path / name, np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(60):
            picture = rng.integers(0, 40, (48, 64, 3)).astype(np.uint8) + np.uint8(3 * number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    expected = np.stack([upright(frame) for frame in VideoFile(path)])
    video = timed_video(path, 30.0)
    assert video.frames == len(expected) == 60
    for number in (*rng.integers(60, size=60).tolist(), 59, 0, 58, 1):
        assert np.array_equal(video.read([number])[0], expected[number]), number
    numbers = rng.integers(60, size=20).tolist()
    assert np.array_equal(video.read(numbers), expected[numbers])


def test_lerobot_parts(sets: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    def numbers(part: str, **settings: Any) -> list[int]:
        data = opened(sets["images"], part, **settings)
        return [int(data.episode(n).name) for n in range(len(data))]

    assert numbers("all") == [0, 1, 2, 3] and numbers("training") == [0, 1, 2] and numbers("held_out") == [3]
    assert numbers("training", split="0:1,2:4") == [0, 2, 3] and numbers("held_out", split="0:1,2:4") == [1]
    assert numbers("training", held_out="50%:") == [0, 1] and numbers("held_out", held_out="50%:") == [2, 3]
    assert numbers("training", split="train") == [0, 1, 2, 3] and "both" not in capsys.readouterr().out
    assert numbers("held_out", split="train") == [0, 1, 2, 3]
    assert "4 episodes are both in data.split and in data.held_out" in capsys.readouterr().out
    later = opened(sets["images"], "training", split="2:")
    check_frames(opened(sets["images"]), [(2, 5)])
    assert later.episode(0).text(8) == "lift" and later.motions.actions[0, 0] == sum(LENGTHS[:2])
    for setting, text in (("split", "9:"), ("held_out", "test"), ("split", "1-3")):
        with pytest.raises(UserError, match=rf"data.{setting}={text}: .*give a"):
            opened(sets["images"], "training", **{setting: text})


def test_lerobot_of_the_hub_is_read_in_its_cache(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline. What is in no cache is downloaded."""
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, **settings: Any) -> str:
        if not settings.get("local_files_only"):
            asked.append(name)
            raise ConnectionError("no network")
        return real(name, **settings)

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    caches = {"a/one": (tmp_path / "hub", "main"), "a/two": (tmp_path / "lerobot/hub", "v3.0")}
    for name, (cache, revision) in caches.items():
        repository = cache / f"datasets--{name.replace('/', '--')}"
        shutil.copytree(sets["images"], repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / revision).write_text("0" * 40)
    shutil.copytree(sets["images"], tmp_path / "lerobot/a/three")
    for name in ("a/one", "hf://a/one", "hf://datasets/a/one", "a/two", "a/three"):
        assert len(opened(name)) == len(LENGTHS)
    assert asked == []
    with pytest.raises(
        UserError, match=r"/datasets/a/four: cannot be read \(no network\); check name and network"
    ):
        opened("hf://a/four")
    assert asked == ["a/four"]
    with pytest.raises(UserError, match=f"{tmp_path}/none: no such folder; give a LeRobot data set"):
        opened(tmp_path / "none")


@pytest.mark.parametrize("missing", ["data", "meta/tasks.parquet", "meta/episodes"])
def test_lerobot_download_that_was_broken_off_goes_on(
    missing: str, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    whole, part = sets["images"], tmp_path / "lerobot/a/part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / missing) if (part / missing).is_dir() else (part / missing).unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: str(whole))
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    assert opened("a/part").root == whole
    with pytest.raises(UserError, match=f"{missing}.*: missing; copy the data set again"):
        opened(part)  # a folder is the user's own


# ------------------------------------------------------------ what is wrong


def info(**changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / INFO).write_text(json.dumps(json.loads((root / INFO).read_text()) | changes))

    return change


def column(file: str, name: str, change: Callable[[list], Any]) -> Callable[[Path], None]:
    """Changes a column's values in place, or to those that are returned."""

    def rewrite(root: Path) -> None:
        table = pq.read_table(root / file)
        values = table[name].to_pylist()
        returned = change(values)
        kind = table.schema.field(name).type if returned is None else None
        at = table.schema.get_field_index(name)
        pq.write_table(table.set_column(at, name, pa.array(returned or values, kind)), root / file)

    return rewrite


def put(place: int, value: Any) -> Callable[[list], None]:
    return lambda values: values.__setitem__(place, value)


def cut(file: str, share: float) -> Callable[[Path], None]:
    return lambda root: (root / file).write_bytes((b := (root / file).read_bytes())[: int(len(b) * share)])


def other_codec(root: Path) -> None:
    """One that nobody knows."""
    (root / VIDEO).write_bytes((root / VIDEO).read_bytes().replace(b"avc1", b"zzzz"))


FROM = "videos/observation.images.wrist/from_timestamp"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "version": (info(codebase_version="v2.0"), r"meta/info.json: version v2.0; v2.1 and v3.0 .*: convert it"),
    "newer": (info(codebase_version="v9.9"), r"meta/info.json: version v9.9; v2.1 and v3.0 can be read"),
    "mixed": (info(codebase_version="v2.1"), r"info.json: says v2.1, the files are v3.0's; correct"),
    "no_version": (info(codebase_version=None), r"meta/info.json: version None; .* convert it"),
    "outside": (info(data_path="../{chunk_index}/{file_index}"), r"name ../0/0, outside the folder"),
    "template": (info(data_path="{x.y}.parquet"), r"\{x.y\}.parquet: missing; copy the data set again"),
    "rate": (info(fps=25), r"top.*mp4: .*7 frames at 10 per second, not at 25.*; replace"),
    "no_rate": (info(fps="fast"), r"info.json: .*'fast'.*; copy"),
    "features": (info(features=[1]), r"info.json: cannot be read .*; copy"),
    "no_json": (cut(INFO, 0.5), r"info.json: cannot be read .*; give the folder"),
    "no_tasks": (lambda root: (root / TASKS).unlink(), r"tasks.parquet: missing; copy"),
    "unknown_task": (
        column(ROWS, "task_index", put(8, 7)),
        r"file-000.parquet.*episode 1: task 7 is not.*; copy",
    ),
    "no_text": (column(TASKS, "task", put(1, None)), r"tasks.parquet: .*task: 1 values are missing"),
    "length": (
        column(EPISODES, "length", put(1, 13)),
        r"top.*mp4: has 12 frames, episode 1 needs 13; copy",
    ),
    "rows": (column(ROWS, "episode_index", put(8, 0)), r"file-000.parquet.*episode 0 has 8 rows here, 7 in"),
    "negative": (column(EPISODES, "length", put(1, -1)), r"meta/episodes: .*episode 1 has -1 frames"),
    "huge": (column(EPISODES, "length", put(1, 10**12)), r"episode 1 has 1,000,000,000,000 frames"),
    "time": (column(ROWS, "timestamp", put(10, 9.0)), r"episode 1, frame 3: timestamp 9.0, not 3 / 10 s"),
    "steps": (column(ROWS, "frame_index", put(10, 9)), r"episode 1: its frame_index does not count"),
    "short_video": (
        column(EPISODES, FROM, put(3, 2.9)),
        r"wrist/.*mp4: has 33 frames, episode 3 needs 34; copy .*leave the episode out \(data.split",
    ),
    "no_time": (
        column(EPISODES, FROM, put(3, float("nan"))),
        r"episodes: .*from_timestamp holds what is no time",
    ),
    "nan": (
        column(ROWS, "action", lambda v: v[10].__setitem__(2, float("nan"))),
        r"copy: episode 000001, frame 3: c is nan; correct it or leave the episode out",
    ),
    "size": (
        column(ROWS, "action", lambda v: [row[:3] for row in v]),
        r"file-000.parquet: action has 3 values .* 4 numbers in info.json; copy",
    ),
    "sizes": (
        column(ROWS, "action", lambda v: [row[: 4 - (n == 9)] for n, row in enumerate(v)]),
        r"file-000.parquet: .*action: its rows are not vectors of one length",
    ),
    "texts": (
        column(ROWS, "observation.state", lambda v: [["a", "b", "c"]] * len(v)),
        r"file-000.parquet: .*observation.state",
    ),
    "no_column": (
        lambda root: pq.write_table(pq.read_table(root / ROWS).drop_columns(["action"]), root / ROWS),
        r"file-000.parquet: .*no column action, which info.json names",
    ),
    "parquet": (cut(ROWS, 0.7), r"file-000.parquet: cannot be read .*; copy"),
    "no_parquet": (lambda root: (root / ROWS).unlink(), r"file-000.parquet: missing; copy"),
    "video": (cut(VIDEO, 0.7), r"wrist.*mp4: cannot be read .*; replace or remove"),
    "no_video": (lambda root: (root / VIDEO).unlink(), r"wrist.*mp4: missing; copy"),
    "codec": (other_codec, r"wrist.*mp4: cannot be read .*no stream that can be decoded.*; "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_lerobot_damage_is_one_line(damage: str, sets: dict[str, Path], tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    root = Path(shutil.copytree(sets["h264"], tmp_path / "copy"))
    change(root)
    with pytest.raises(UserError, match=message) as caught:
        data = opened(root)
        data.motions.rows(np.arange(3))
        data.read(data.episode(1), [3], data.cameras)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


def test_lerobot_statistics_of_others_are_not_believed(sets: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(sets["images"], tmp_path / "copy"))
    (root / "meta/stats.json").write_text('{"action": {"mean": [NaN], "std": [0]}}')
    data = opened(root)
    robot = data.robot().fitted(data.motions, "mean_std")
    assert robot.actions.offset == pytest.approx(Robot().read_motions(range(sum(LENGTHS)))[:, :4].mean(0))


def test_lerobot_damaged_pictures_are_named(sets: dict[str, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(sets["images"], tmp_path / "copy"))
    column(ROWS, "observation.images.top", put(10, {"bytes": b"no PNG", "path": None}))(root)
    data = opened(root)
    check_frames(data, [(1, 2)])
    with pytest.raises(
        UserError, match=r"file-000.parquet: observation.images.top of row 10: .*neither JPEG"
    ):
        data.read(data.episode(1), [3], ["top"])


def test_lerobot_names_that_are_not_there(sets: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"has no camera front; data.cameras: choose from top, wrist"):
        opened(sets["images"], cameras=["front"])
    with pytest.raises(
        UserError, match=r"has no torque; data.actions: choose from observation.state, action"
    ):
        opened(sets["images"], actions="torque")
    data = opened(sets["images"], cameras=["hand:wrist", "all:observation.images.top"], state=None)
    assert data.cameras == ("hand", "all") and data.state_names == () and data.motions.state.shape[1] == 0
    assert data.left_out == []
    assert opened(sets["images"], cameras=["wrist"]).left_out == [
        "the camera observation.images.top (data.cameras)"
    ]


def test_lerobot_index_is_of_the_cameras_and_episodes_that_were_asked_for(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    """A camera that is not looked at may be damaged, and an episode left out; checked ones stay checked."""
    root = Path(shutil.copytree(sets["h264"], tmp_path / "copy"))
    column(EPISODES, FROM, put(3, 2.9))(root)
    opened(root, cameras=["top"])
    for _ in range(2):
        with pytest.raises(UserError, match="episode 3 needs 34"):
            opened(root)
    check_frames(opened(root, split="0:3"), [(2, 8)])
    (root / VIDEO).unlink()
    opened(root, cameras=["top"])


# ------------------------------------------------------------ what is written


def run(**values: Any) -> None:
    """The command."""
    GlobalHydra.instance().clear()
    sys.argv = ["convert", *(f"{key}={value}" for key, value in values.items())]
    convert.main()


def same(one: Dataset, other: Dataset, exact: bool = True) -> None:
    """Two data sets hold the same episodes; in videos each picture is like the same one alone."""
    assert one.lengths.tolist() == other.lengths.tolist() and one.cameras == other.cameras
    for number in range(len(one)):
        a, b = one.episode(number), other.episode(number)
        assert (a.length, a.task, [*a.sentences()]) == (b.length, b.task, [*b.sentences()])
        pictures = [each.read(e, range(e.length), one.cameras) for each, e in ((one, a), (other, b))]
        for camera in one.cameras:
            mine, others = (each[camera].astype(int) for each in pictures)
            away = np.array([np.abs(others - picture).mean((1, 2, 3)) for picture in mine])
            assert away.argmin(1).tolist() == list(range(a.length)), (number, camera)
            assert away.diagonal().max() == 0 or not exact, (number, camera)
        rows = [
            m.rows(np.arange(e.start, e.start + e.length)) for m, e in ((one.motions, a), (other.motions, b))
        ]
        assert np.array_equal(one.motions.actions[rows[0]], other.motions.actions[rows[1]])
        assert np.array_equal(one.motions.state[rows[0]], other.motions.state[rows[1]])


@pytest.mark.parametrize("pictures", ["images", "av1", "h264"])
def test_lerobot_from_calvin_and_back(pictures: str, tmp_path: Path) -> None:
    """Random pictures: the codecs change them, but no frame into another."""
    demos = write_demonstrations(tmp_path / "demos", lengths=(15, 22, 8))
    calvin = open_dataset({"format": "calvin", "root": str(demos)})
    run(data="calvin", **{"data.root": demos}, output=tmp_path / "lerobot", pictures=pictures, data_mb=0.02)
    converted = opened(tmp_path / "lerobot")
    same(calvin, converted, exact=pictures == "images")
    back = tmp_path / "calvin/training"
    run(data="lerobot", **{"data.root": tmp_path / "lerobot", "to": "calvin"}, output=back)
    same(converted, open_dataset({"format": "calvin", "root": str(back.parent)}))


def test_lerobot_to_calvin_takes_calvins_robot_alone(sets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="wants the camera static, the camera gripper, 7 actions, 15 numbers of state"
    ):
        convert.write_calvin(opened(sets["images"]), tmp_path)
    with pytest.raises(UserError, match="10 frames per second|even sizes"):
        odd = Robot()
        odd._frames = lambda number, positions: flat(number, positions)[:, 1:]
        LeRobotWriter(odd, tmp_path, "h264", 1, 1, "made_up").add(odd.episode(0))


WRITING = ((output_folder, "sync"), (os, "replace"), (shutil, "rmtree"), (Path, "write_text"))


def start(demos: Path, output: Path, last_act: int) -> None:
    die_before(last_act, WRITING)
    run(data="calvin", **{"data.root": demos}, output=output, overwrite=True)


def test_lerobot_conversion_that_is_killed_destroys_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each act of writing: the old folder or the new one is there, whole."""
    demos, output = write_demonstrations(tmp_path / "demos"), tmp_path / "out"
    run(data="calvin", **{"data.root": demos}, output=tmp_path / "whole")
    new = contents(tmp_path / "whole")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_lerobot"])
    states, act, code = set(), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        if not output.exists():
            output.mkdir()
            (output / "precious").write_text("old")
        process = context.Process(target=start, args=(demos, output, act))
        process.start()
        process.join()
        code, act = process.exitcode, act + 1
        places = (output, tmp_path / ".out.old.writing")
        found = next(contents(place) for place in places if place.is_dir())
        states.add("new" if found == new else "old" if found == {"precious": b"old"} else "broken")
        if found == new:
            shutil.rmtree(output)
    assert code == 0 and act > 10 and states == {"old", "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos", "whole"]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_lerobot_vectors_of_the_same_names_do_not_share_an_index(sets: dict[str, Path]) -> None:
    """Actions read as state have other numbers under the names that the state's would have."""
    usual, swapped = opened(sets["images"]), opened(sets["images"], actions="observation.state")
    assert usual.fingerprint != swapped.fingerprint
    assert np.array_equal(swapped.motions.actions, swapped.motions.state)


def test_lerobot_texts_with_marks_that_part_lines_elsewhere(sets: dict[str, Path], tmp_path: Path) -> None:
    """JSON allows them in a text."""
    shutil.copytree(sets["v21"], root := tmp_path / "v21")
    said = "open\u2028the\u0085drawer"
    rows = [json.loads(line) for line in (root / "meta/tasks.jsonl").read_text().split("\n")]
    rows = [row | {"task": said if row["task"] == "open" else row["task"]} for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (root / "meta/tasks.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert opened(root).episode(0).text(0) == said
