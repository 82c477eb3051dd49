"""Every frame of a video has one number, whatever the file: that of a decoder which starts at the beginning.

Files of many kinds are made here and damaged. `straight` decodes each from its beginning, as the reader's
promise says; reading by number, in whatever order, must show the same pictures.
"""

import io
import random
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from defi.errors import UserError
from defi.video import frame_count, frame_rate, number_video, read_frames, read_video

FRAMES, HEIGHT, WIDTH = 40, 48, 64
COVER = 1024  # the disposition of an attached picture
CLOSED = {"x264-params": "keyint=12:bframes=2:scenecut=0"}
OPEN = {"x264-params": "keyint=12:bframes=3:b-adapt=0:scenecut=0:open-gop=1"}
X265 = {"x265-params": "keyint=12:log-level=0"}
FINE = {"g": "12", "qmin": "2", "qmax": "2", "b": "4000000"}
ALT_REF = {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "5"}
LIVE = {"live": "1"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def scene(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture that is as bright as its number says, with some texture so that encoders have work."""
    texture = np.random.default_rng(number).integers(0, 12, (height, width, 3))
    texture[: height // 3, : width // 3, 0] += 40  # tells how it is turned
    return (texture + 4 * number).clip(0, 255).astype(np.uint8)


def write(
    file: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    frames: int = FRAMES,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    pixels: str = "yuv420p",
    container: str | None = None,
    settings: dict[str, str] | None = None,
    clock: Fraction | None = None,
    times: Callable[[int], int] = int,
    rate: int = 25,
    before: str = "",
) -> Path:
    """A video of `frames` scenes; `before`: another stream that the file has first."""
    with av.open(str(file), "w", format=container, options=settings or {}) as out:
        sound = out.add_stream("aac", rate=16000, layout="mono") if before == "audio" else None
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.options = *size, pixels, options or {}
        if clock:
            stream.codec_context.time_base = stream.time_base = clock
        if sound:
            for block in range(25):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                samples.sample_rate, samples.pts = 16000, 1024 * block
                out.mux(sound.encode(samples))
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(scene(number, *size), format="rgb24")
            frame.pts = times(number)
            if clock:
                frame.time_base = clock
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if sound:
            out.mux(sound.encode())
    return file


def turned(frame: av.VideoFrame) -> np.ndarray:
    """A frame's picture as a player shows it."""
    picture = frame.to_ndarray(format="rgb24")
    return np.rot90(picture, round(frame.rotation / 90))


def straight(file: Path) -> list[np.ndarray]:
    """All pictures of a file, decoded from its beginning."""
    pictures: list[np.ndarray] = []
    with av.open(str(file)) as container:
        stream = next(s for s in container.streams.video if not int(s.disposition) & COVER)
        for packet in container.demux(stream):
            try:
                pictures += [turned(frame) for frame in packet.decode()]
            except av.FFmpegError:
                pass
    return pictures


def check(file: Path) -> int:
    """Read a file in many ways; the number of its frames."""
    true = straight(file)
    if not true:
        with pytest.raises(UserError, match="cannot be read"):
            frame_count(file)
        return 0
    true = np.stack(true)
    assert frame_count(file) == len(true)
    np.testing.assert_array_equal(read_video(file)[0], true)
    np.testing.assert_array_equal(read_video(file, every=3)[0], true[::3])
    np.testing.assert_array_equal(read_frames(file), true)
    draw = random.Random(0)
    every = [[number] for number in range(len(true))]
    pairs = [draw.sample(range(len(true)), min(2, len(true))) for _ in range(20)]
    clips = [range(first, min(first + 7, len(true))) for first in range(0, len(true), 5)]
    for wanted in [*every, *pairs, *clips, range(0, len(true), 5)]:
        np.testing.assert_array_equal(read_frames(file, wanted), true[list(wanted)])
    return len(true)


KINDS: dict[str, tuple[Any, ...]] = {
    # name: codec, options, settings of `write`
    "closed.mp4": ("libx264", CLOSED, {}),
    "closed.mkv": ("libx264", CLOSED, {}),
    "closed.avi": ("libx264", CLOSED, {}),
    "open.mp4": ("libx264", OPEN, {}),
    "open.mkv": ("libx264", OPEN, {}),
    "open.avi": ("libx264", OPEN, {}),
    "refresh.mp4": ("libx264", {"x264-params": "keyint=12:intra-refresh=1"}, {}),
    "interlaced.mp4": ("libx264", {"x264-params": "keyint=12:interlaced=1:bframes=2"}, {"size": (64, 64)}),
    "intra.mp4": ("libx264", {"x264-params": "keyint=1"}, {}),
    "wide.mp4": ("libx264", CLOSED, {"size": (48, 96)}),
    "odd.mp4": ("libx264", CLOSED, {"size": (47, 65), "pixels": "yuv444p"}),
    "10_bit.mp4": ("libx264", CLOSED, {"pixels": "yuv420p10le"}),
    "gray.mp4": ("libx264", CLOSED, {"pixels": "gray"}),
    "fragments.mp4": ("libx264", CLOSED, {"settings": FRAGMENTS}),
    "open_fragments.mp4": ("libx264", OPEN, {"settings": FRAGMENTS}),
    "live.mkv": ("libx264", CLOSED, {"settings": LIVE}),
    "uneven.mp4": ("libx264", CLOSED, {"times": lambda i: i + i // 3}),
    "late.mp4": ("libx264", CLOSED, {"times": lambda i: i + 100}),
    "negative.mkv": ("libx264", CLOSED, {"times": lambda i: i - 10}),
    "milliseconds.mkv": (
        "libx264", CLOSED, {"clock": Fraction(1, 1000), "rate": 1000, "times": lambda i: 33 * i + 7 * (i % 3)},
    ),
    "audio_first.mp4": ("libx264", CLOSED, {"before": "audio"}),
    "transport.mp4": ("libx264", CLOSED, {"container": "mpegts"}),
    "open_transport.mkv": ("libx264", OPEN, {"container": "mpegts"}),
    "audio_transport.mp4": ("libx264", CLOSED, {"container": "mpegts", "before": "audio"}),
    "program.mp4": ("libx264", CLOSED, {"container": "vob"}),
    "flash.mp4": ("libx264", CLOSED, {"container": "flv"}),
    "stream.mp4": ("libx264", CLOSED, {"container": "h264"}),
    "open_stream.mp4": ("libx264", OPEN, {"container": "h264"}),
    "hevc.mp4": ("libx265", X265, {}),
    "hevc.mkv": ("libx265", X265, {}),
    "hevc_closed.mp4": ("libx265", {"x265-params": "keyint=12:open-gop=0:log-level=0"}, {}),
    "hevc_transport.mp4": ("libx265", X265, {"container": "mpegts"}),
    "hevc_10_bit.mp4": ("libx265", X265, {"pixels": "yuv420p10le"}),
    "vp8.webm": ("libvpx", {"g": "12"}, {}),
    "vp8_hidden.webm": ("libvpx", ALT_REF, {}),
    "vp8_recorder.webm": (
        "libvpx", {"g": "12"},
        {"settings": LIVE, "clock": Fraction(1, 1000), "rate": 1000, "times": lambda i: 33 * i + 7 * (i % 3)},
    ),
    "vp9.webm": ("libvpx-vp9", {"g": "12"}, {}),
    "vp9_hidden.webm": ("libvpx-vp9", ALT_REF, {}),
    "vp9.mp4": ("libvpx-vp9", ALT_REF, {}),
    "vp9_alpha.webm": ("libvpx-vp9", {"g": "12", "auto-alt-ref": "0"}, {"pixels": "yuva420p"}),
    "av1.mp4": ("libsvtav1", {"g": "12"}, {}),
    "av1.webm": ("libsvtav1", {"g": "12"}, {}),
    "mpeg4.mp4": ("mpeg4", FINE, {}),
    "mpeg4.avi": ("mpeg4", FINE | {"bf": "2"}, {}),
    "mpeg4_gaps.avi": ("mpeg4", FINE | {"bf": "2"}, {"times": lambda i: i + 2 * (i // 5)}),
    "gaps.avi": ("libx264", CLOSED, {"times": lambda i: i + 2 * (i // 5)}),
    "mpeg2.mkv": ("mpeg2video", FINE | {"bf": "2"}, {}),
    "mpeg2_transport.mp4": ("mpeg2video", FINE | {"bf": "2"}, {"container": "mpegts"}),
    "mpeg2_program.mkv": ("mpeg2video", FINE | {"bf": "2"}, {"container": "mpeg"}),
    "mpeg1.mp4": ("mpeg1video", FINE | {"bf": "2"}, {"container": "mpeg"}),
    "mjpeg.avi": ("mjpeg", {"qmin": "2"}, {"pixels": "yuvj420p"}),
    "mjpeg_gaps.avi": ("mjpeg", {"qmin": "2"}, {"pixels": "yuvj420p", "times": lambda i: i + 2 * (i // 5)}),
    "mjpeg.mov": ("mjpeg", {"qmin": "2"}, {"pixels": "yuvj420p"}),
    "prores.mov": ("prores_ks", {}, {"pixels": "yuv422p10le"}),
    "animation.mov": ("qtrle", {"g": "12"}, {"pixels": "rgb24"}),
    "png.mov": ("png", {}, {"pixels": "rgb24"}),
    "raw.avi": ("rawvideo", {}, {}),
    "raw.mov": ("rawvideo", {}, {"pixels": "yuyv422"}),
    "ffv1.mkv": ("ffv1", {}, {}),
    "huffyuv.avi": ("huffyuv", {}, {"pixels": "yuv422p"}),
    "gif.mp4": ("gif", {}, {"pixels": "rgb8", "container": "gif"}),
}  # fmt: skip
SAME = ("h264", "hevc", "mp4")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    assert check(write(tmp_path / name, codec, options, **settings)) >= FRAMES - 1
