"""Videos written and read back, and the picture operations."""

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


@pytest.mark.parametrize("width", [64, 65, 96])  # decord alone fails on 96
def test_written_video_reads_back(tmp_path: Path, width: int) -> None:
    video = moving_square(width=width)
    write_mp4(tmp_path / "clips" / "a.mp4", video, fps=7.5)
    assert frame_count(tmp_path / "clips" / "a.mp4") == len(video)
    back = read_frames(tmp_path / "clips" / "a.mp4", [7, 0, 3, 3])[:, :, :width]
    assert np.abs(back.astype(int) - video[[7, 0, 3, 3]]).mean() < 4  # lossy, but the same frames
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["a.mp4"]


def write_numbered(file: Path, codec: str, options: dict[str, str], frames: int = 40, **stream: str) -> None:
    """A video whose frames are as bright as their numbers say: see `numbers`."""
    with av.open(str(file), "w") as container:
        video = container.add_stream(codec, rate=25)
        video.width, video.height, video.options = stream.get("width", 64), 48, options
        video.pix_fmt = stream.get("pix_fmt", "yuv420p")
        for number in range(frames):
            picture = np.full((48, video.width, 3), number * 6, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number + number // 3 if stream.get("uneven") else number
            container.mux(video.encode(frame))
        container.mux(video.encode())


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 6) for frame in frames]


X265 = {"x265-params": "keyint=12:log-level=0"}
X264 = {"x264-params": "keyint=12:bframes=3:b-adapt=0:scenecut=0"}
OPEN = {"x264-params": X264["x264-params"] + ":open-gop=1"}
FINE = {"g": "12", "qmin": "2", "qmax": "2", "b": "4000000"}


@pytest.mark.parametrize(
    ("name", "codec", "options", "stream"),
    [
        ("hevc.mp4", "libx265", X265, {}),  # frames that follow a key frame in the file are shown before it
        ("hevc.mkv", "libx265", X265, {}),
        ("hevc_10_bit.mp4", "libx265", X265, {"pix_fmt": "yuv420p10le"}),
        ("hevc_uneven.mp4", "libx265", X265, {"uneven": True}),
        ("hevc_wide.mp4", "libx265", X265, {"width": 96}),
        ("open.mp4", "libx264", OPEN, {}),
        ("open.mkv", "libx264", OPEN, {}),
        ("open.avi", "libx264", OPEN, {}),
        ("closed.mp4", "libx264", X264, {}),
        ("closed.mkv", "libx264", X264, {"uneven": True}),
        ("closed.avi", "libx264", X264, {}),  # which has no times of frames
        ("one_key.avi", "libx264", {"x264-params": "bframes=3:b-adapt=0"}, {}),
        ("10_bit.mp4", "libx264", X264, {"pix_fmt": "yuv420p10le"}),
        ("wide.mp4", "libx264", X264, {"width": 96}),
        ("vp8.webm", "libvpx", {"g": "12"}, {}),
        ("vp9.webm", "libvpx-vp9", {"g": "12"}, {}),
        ("av1.mp4", "libsvtav1", {"g": "12"}, {}),
        ("mpeg4.mp4", "mpeg4", FINE, {}),
        ("mpeg4.avi", "mpeg4", FINE | {"bf": "2"}, {}),
        ("mpeg2.mkv", "mpeg2video", FINE | {"bf": "2"}, {}),
    ],
)
def test_every_frame_has_its_number(
    tmp_path: Path, name: str, codec: str, options: dict, stream: dict
) -> None:
    file = tmp_path / name
    write_numbered(file, codec, options, **stream)
    assert frame_count(file) == 40
    assert [numbers(read_frames(file, [number]))[0] for number in range(40)] == list(range(40))
    assert numbers(read_frames(file, range(0, 40, 5))) == list(range(0, 40, 5))
    assert numbers(read_frames(file, [39, 0, 13, 13, 11])) == [39, 0, 13, 13, 11]


def test_frames_before_a_cut_without_new_encoding_are_not_seen(tmp_path: Path) -> None:
    write_numbered(tmp_path / "whole.mp4", "libx264", X264)
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (
                    int(time - 5 / 25 / packet.time_base) for time in (packet.pts, packet.dts)
                )
                packet.stream = stream
                cut.mux(packet)
    assert [numbers(read_frames(tmp_path / "cut.mp4", [number]))[0] for number in range(35)] == list(
        range(5, 40)
    )


def test_a_video_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    for codec, options in (("libx265", X265), ("libx264", X264)):
        write_numbered(tmp_path / "a.mp4", codec, options)
        assert numbers(read_frames(tmp_path / "a.mp4", [9, 10, 25, 39])) == [9, 10, 25, 39]


def test_browsers_can_play_it(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving_square(), fps=10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 10


def test_unreadable_videos_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.mp4: no such video"):
        read_frames(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"text\.mp4: cannot be read"):
        read_frames(tmp_path / "text.mp4")
    write_mp4(tmp_path / "short.mp4", moving_square(4), fps=10)
    with pytest.raises(UserError, match=r"short\.mp4: has 4 frames, frame 9"):
        read_frames(tmp_path / "short.mp4", [0, 9])


@pytest.mark.parametrize(
    ("share", "told"), [(1 / 3, "cannot be read"), (4 / 5, r"damaged, frame \d+ cannot")]
)
def test_truncated_video_is_named(tmp_path: Path, share: float, told: str) -> None:
    write_mp4(tmp_path / "cut.mp4", moving_square(60), fps=10)
    content = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=rf"cut\.mp4: {told}"):
        read_frames(tmp_path / "cut.mp4")


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
