"""Videos written and read back, and the picture operations."""

import gc
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from defi.errors import UserError
from defi.video import (
    draw_text,
    frame_count,
    prepare_frames,
    read_frames,
    resize,
    to_float,
    to_uint8,
    write_mp4,
)


def moving_square(frames: int = 8, height: int = 48, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), 40, np.uint8)
    for i in range(frames):
        video[i, 10:26, 4 + 5 * i : 20 + 5 * i] = (220, 60, 30)
    return video


@pytest.mark.parametrize("width", [64, 65, 96])
def test_written_video_reads_back(tmp_path: Path, width: int) -> None:
    video = moving_square(width=width)
    write_mp4(tmp_path / "clips" / "a.mp4", video, fps=7.5)
    assert frame_count(tmp_path / "clips" / "a.mp4") == len(video)
    back = read_frames(tmp_path / "clips" / "a.mp4", [7, 0, 3, 3])[:, :, :width]
    assert np.abs(back.astype(int) - video[[7, 0, 3, 3]]).mean() < 4  # lossy, but the same frames
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["a.mp4"]


def test_a_video_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    for frames in (9, 5):
        write_mp4(tmp_path / "a.mp4", moving_square(frames), fps=10)
        assert len(read_frames(tmp_path / "a.mp4")) == frame_count(tmp_path / "a.mp4") == frames


def test_browsers_can_play_it(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving_square(), fps=10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 10


def test_unreadable_videos_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.mp4: missing"):
        read_frames(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"text\.mp4: cannot be read"):
        read_frames(tmp_path / "text.mp4")
    write_mp4(tmp_path / "short.mp4", moving_square(4), fps=10)
    with pytest.raises(UserError, match=r"short\.mp4: has 4 frames, frame 9"):
        read_frames(tmp_path / "short.mp4", [0, 9])


def test_pixels_survive_the_float_range() -> None:
    video = moving_square()
    assert np.array_equal(to_uint8(to_float(video)), video)
    assert prepare_frames(video, 32).shape == (8, 3, 32, 32)


def test_resize_antialiases() -> None:
    """A fine checkerboard becomes grey, not an alias of itself; constant images stay constant."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    small = resize(board.expand(1, 3, 64, 64), 16)
    assert small.abs().max() < 0.1
    assert torch.allclose(resize(torch.full((1, 3, 84, 84), 0.3), 128), torch.tensor(0.3))


def test_caption_keeps_the_frame() -> None:
    frame = moving_square()[0]
    long = draw_text(frame, "push the red block to the left and then open the drawer")
    short = draw_text(frame, "open the drawer")
    assert np.array_equal(long[: len(frame)], frame)
    assert len(long) > len(short) > len(frame)
    assert long[len(frame) :].max() > 200  # there is writing


def test_files_are_closed_without_the_garbage_collector(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    write_mp4(file, moving_square(), fps=8)
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for frame in (0, 5):
            read_frames(file, [frame])
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
