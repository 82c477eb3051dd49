"""Frames of videos are counted once: what a later start opens, where the index lies, what it survives."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from defi import video_index
from defi.data import open_dataset
from defi.errors import UserError
from defi.video import FIX, VIDEO_SUFFIXES, Numbering, number_video, write_mp4
from defi.video_index import INDEX, VERSION, number_videos


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos of 4, 5 and 6 frames, and a broken one."""
    root = tmp_path / "videos"
    for number, name in enumerate(("a.mp4", "kitchen/b.mp4", "kitchen/c.mov")):
        write_mp4(root / name, np.zeros((4 + number, 32, 32, 3), np.uint8), 10)
    (root / "damaged.mp4").write_bytes(b"no video")
    return root


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that were opened, in a user's cache of its own."""
    names: list[str] = []

    def counted(file: Path) -> Numbering:
        names.append(file.name)
        return number_video(file)

    monkeypatch.setattr(video_index, "number_video", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def counts(root: Path) -> dict[str, int | str]:
    """Frames by name, or the fault."""
    files = sorted(p for p in root.rglob("*") if p.suffix in VIDEO_SUFFIXES)
    found = zip(files, number_videos(root, files))
    return {f.name: n.frames if isinstance(n, Numbering) else str(n) for f, n in found}


def expected(root: Path, **changes: int) -> dict[str, int | str]:
    fault = f"{root / 'damaged.mp4'}: cannot be read (Invalid data found when processing input); {FIX}"
    names = {"a": "a.mp4", "b": "b.mp4", "c": "c.mov"}
    found = {"a.mp4": 4, "damaged.mp4": fault, "b.mp4": 5, "c.mov": 6}
    return found | {names[name]: n for name, n in changes.items()}


def test_a_later_start_opens_nothing(videos: Path, opened: list[str]) -> None:
    assert counts(videos) == expected(videos)
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.mov", "damaged.mp4"]
    opened.clear()
    assert counts(videos) == expected(videos) and opened == []
    moved = shutil.move(videos, videos.with_name("moved"))
    assert counts(moved) == expected(moved) and opened == []
    with pytest.warns(UserWarning, match=r"1 of 4 videos left out; the first: .*moved/damaged\.mp4: cannot"):
        data = open_dataset({"format": "videos", "root": str(moved)}, "all")
    assert data.lengths.tolist() == [4, 5, 6]
    assert opened == [], "nor does the data set"


def test_only_changed_and_new_videos_are_opened(videos: Path, opened: list[str]) -> None:
    counts(videos)
    opened.clear()
    write_mp4(videos / "a.mp4", np.zeros((9, 32, 32, 3), np.uint8), 10)
    write_mp4(videos / "new.mp4", np.zeros((3, 32, 32, 3), np.uint8), 10)
    (videos / "kitchen" / "c.mov").unlink()
    found = counts(videos)
    assert (found["a.mp4"], found["new.mp4"]) == (9, 3) and sorted(opened) == ["a.mp4", "new.mp4"]
    lines = map(json.loads, (videos / ".defi" / INDEX).read_text().splitlines())
    assert {name for name, *_ in lines} == {"a.mp4", "damaged.mp4", "kitchen/b.mp4", "new.mp4"}
    opened.clear()
    os.utime(videos / "new.mp4", ns=(0, 0))  # of the same size, changed at another time
    assert counts(videos) == found and opened == ["new.mp4"]


def test_where_the_folder_cannot_be_written_to(videos: Path, opened: list[str], tmp_path: Path) -> None:
    (videos / ".defi").write_text("a file where the index's folder would be")
    for times in (4, 0):
        assert counts(videos) == expected(videos) and len(opened) == times
        opened.clear()
    assert len(list((tmp_path / "cache" / "defi" / "videos").rglob(INDEX))) == 1
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("nor can the user's cache")
    for _ in range(2):
        assert counts(videos) == expected(videos) and len(opened) == 4
        opened.clear()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b'["a.mp4", SIZE, TIME, ',
        b'["a.mp4", SIZE, TIME, 3]',  # as the first version wrote it
        b'["a.mp4", SIZE, TIME, OLD, 3, [[0, null]]]',
        b'["a.mp4", SIZE, TIME, VERSION, 3, [[0, null]], 4]',
        b'{"a.mp4": [SIZE, TIME, VERSION, 3]}',
        b'[1, 2]\n4\n[["a.mp4"], SIZE, TIME, VERSION, 3, [[0, null]]]',
        b"[" * 10**5,
        b'["a.mp4", SIZE, TIME, VERSION, 1e9, [[0, null]]]',
        b'["a.mp4", SIZE, TIME, VERSION, -3, [[0, null]]]',
        b'["a.mp4", SIZE, TIME, VERSION, true, [[0, null]]]',
        b'["a.mp4", SIZE, TIME, VERSION, 99999999999999999999, [[0, null]]]',
        b'["a.mp4", SIZE, TIME, VERSION, null, [[0, null]]]',
        b'["a.mp4", SIZE, TIME, VERSION, 3, null]',
        b'["a.mp4", SIZE, TIME, VERSION, 3, []]',
        b'["a.mp4", SIZE, TIME, VERSION, 3, [0, null]]',
        b'["a.mp4", SIZE, TIME, VERSION, 3, [[1, null]]]',
        b'["a.mp4", SIZE, TIME, VERSION, 3, [[0, null], [1, "2"]]]',
        b'["a.mp4", SIZE, TIME, VERSION, 3, [[0, null], [1, 1e400]]]',
    ],
)
def test_an_index_that_is_none_says_nothing(videos: Path, opened: list[str], content: bytes) -> None:
    stat = (videos / "a.mp4").stat()
    values = {"SIZE": stat.st_size, "TIME": stat.st_mtime_ns, "VERSION": VERSION, "OLD": VERSION - 1}
    for name, value in values.items():
        content = content.replace(name.encode(), b"%d" % value)
    (videos / ".defi").mkdir()
    (videos / ".defi" / INDEX).write_bytes(content)
    assert counts(videos) == expected(videos) and len(opened) == 4
    opened.clear()
    assert counts(videos) == expected(videos) and opened == []


def test_an_index_of_any_length(videos: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bound follows the number of videos; beyond it the index is not even opened."""
    counts(videos)
    index = videos / ".defi" / INDEX
    whole = index.read_text()
    monkeypatch.setattr(video_index, "FEWEST", 1)
    monkeypatch.setattr(video_index, "LONGEST", max(map(len, whole.splitlines())) + 1)
    opened.clear()
    assert counts(videos) == expected(videos) and opened == []
    index.write_text("[]\n" * 1000 + whole)
    assert counts(videos) == expected(videos) and len(opened) == 4


def test_an_interrupted_count_goes_on(
    videos: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = video_index.number_video

    def dies(file: Path) -> Numbering:
        if len(opened) == 2:
            raise KeyboardInterrupt
        return counted(file)

    with monkeypatch.context() as patch:
        patch.setattr(video_index, "PART", 1)
        patch.setattr(video_index, "PAUSE", 0)
        patch.setattr(video_index, "number_video", dies)
        with pytest.raises(KeyboardInterrupt):
            counts(videos)
    assert counts(videos) == expected(videos)
    assert sorted(opened) == ["a.mp4", "b.mp4", "c.mov", "damaged.mp4"]


def test_one_of_several_processes_counts(videos: Path, opened: list[str]) -> None:
    found: list[dict[str, int | str]] = []
    start: Callable[[], None] = lambda: found.append(counts(videos))  # noqa: E731
    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected(videos)] * 3 and len(opened) == 4


def test_a_full_disk_does_not_stop_the_start(
    videos: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_index, "write_file", full)
    with pytest.warns(UserWarning, match=r"frames\.jsonl: not written \(No space left on device\)"):
        assert counts(videos) == expected(videos)


def test_a_link_to_nowhere_is_named(videos: Path, opened: list[str]) -> None:
    (videos / "gone.mp4").symlink_to("nowhere")
    assert counts(videos)["gone.mp4"] == f"{videos / 'gone.mp4'}: missing; {FIX}"
    assert counts(videos)["gone.mp4"].endswith(f"missing; {FIX}")
    with pytest.raises(UserError, match="no videos here"):
        (videos.parent / "none").mkdir()
        open_dataset({"format": "videos", "root": str(videos.parent / "none")})
    assert not any((videos.parent / "none").iterdir())
