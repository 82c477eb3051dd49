"""Every frame of a video has one number, whatever the file: that of a decoder which starts at the beginning.

Files of many kinds are made here and damaged. `straight` decodes each from its beginning, as the reader's
promise says; reading by number, in whatever order, must show the same pictures.
"""

import io
import json
import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from defi.data import open_dataset
from defi.errors import UserError
from defi.video import frame_count, number_video, read_frames

FRAMES, HEIGHT, WIDTH = 40, 48, 64
COVER = 1024  # the disposition of an attached picture
CLOSED = {"x264-params": "keyint=12:bframes=2:scenecut=0"}
OPEN = {"x264-params": "keyint=12:bframes=3:b-adapt=0:scenecut=0:open-gop=1"}
X265 = {"x265-params": "keyint=12:log-level=0"}
FINE = {"g": "12", "qmin": "2", "qmax": "2", "b": "4000000"}
ALT_REF = {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "5"}
LIVE = {"live": "1"}
MILLISECONDS = {"clock": Fraction(1, 1000), "rate": 1000, "times": lambda i: 33 * i + 7 * (i % 3)}
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
    """All pictures of a file, decoded from its beginning; none of one that cannot be opened."""
    pictures: list[np.ndarray] = []
    try:
        container = av.open(str(file))
    except (av.FFmpegError, ValueError):
        return pictures
    with container:
        stream = next(s for s in container.streams.video if not int(s.disposition) & COVER)
        stream.codec_context.thread_count = 1  # which alone conceals damage the same way each time
        for packet in container.demux(stream):
            with suppress(av.FFmpegError):
                pictures += [turned(frame) for frame in packet.decode()]
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
    "milliseconds.mkv": ("libx264", CLOSED, MILLISECONDS),
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
    "vp8_recorder.webm": ("libvpx", {"g": "12"}, MILLISECONDS | {"settings": LIVE}),
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


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    file = write(tmp_path / name, codec, options, **settings)
    assert check(file) == FRAMES
    if "times" not in settings:
        assert number_video(file).rate == pytest.approx(25)
    if name.endswith("gaps.avi"):
        assert b"00dc\0\0\0\0" in file.read_bytes(), "this file shall have empty chunks"


@pytest.mark.parametrize("name", ["milliseconds.mkv", "vp8_recorder.webm"])
def test_the_rate_of_a_clock_of_milliseconds(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    file = write(tmp_path / name, codec, options, **settings)
    seconds = (settings["times"](FRAMES - 1) - settings["times"](0)) / 1000
    assert number_video(file).rate == pytest.approx((FRAMES - 1) / seconds)


def test_reading_starts_at_key_frames(tmp_path: Path) -> None:
    """In every kind of file that says where they are, so that no read decodes the file from its beginning."""
    names = ("closed.mp4", "closed.mkv", "fragments.mp4", "uneven.mp4", "odd.mp4", "closed.avi")
    for name in (*names, "open.mp4", "refresh.mp4", "transport.mp4", "hevc.mp4", "vp9.webm"):
        codec, options, settings = KINDS[name]
        starts = number_video(write(tmp_path / name, codec, options, **settings)).starts
        assert starts[0] == (0, None) and len(starts) > 1 and all(time is not None for _, time in starts[1:])


def packets(file: Path) -> list[tuple[int, int]]:
    """Where each packet of a file's video lies, and its length."""
    with av.open(str(file)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size and p.pos]


def copy(source: Path, target: Path, keep: Callable[[int], bool], shift: int = 0, **settings: Any) -> Path:
    """The packets of a video that `keep` names, `shift` frames earlier: a cut without new encoding."""
    with av.open(str(source)) as whole, av.open(str(target), "w", **settings) as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(p for p in whole.demux(video=0) if p.size):
            if keep(number):
                earlier = int(shift / 25 / packet.time_base)
                packet.pts, packet.stream = packet.pts - earlier, stream
                packet.dts = None if packet.dts is None else packet.dts - earlier
                cut.mux(packet)
    return target


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith(("mjpeg", "prores"))])
def test_damaged_packets(tmp_path: Path, name: str) -> None:
    """A frame that is not shown has no number; one that is shown has its picture, as far as it was decoded.

    The two codecs that are left out show what the memory held before where they could not decode.
    """
    codec, options, settings = KINDS[name]
    file = write(tmp_path / name, codec, options, **settings)
    content, places = file.read_bytes(), packets(file)
    for seed in range(2):
        draw, damaged = np.random.default_rng(seed), bytearray(content)
        position, size = (
            places[draw.integers(len(places))] if places else (len(content) // 4, len(content) // 2)
        )
        start = position + draw.integers(size) if seed % 2 else position
        damaged[start : start + 9] = draw.bytes(len(damaged[start : start + 9]))
        file.write_bytes(damaged)
        check(file)


@pytest.mark.parametrize(
    "name",
    [
        "closed.mp4",
        "closed.mkv",
        "closed.avi",
        "transport.mp4",
        "hevc.mp4",
        "hevc.mkv",
        "vp9.webm",
        "vp8.webm",
    ]
    + ["mpeg4.mp4", "mpeg2.mkv", "refresh.mp4"],
)
def test_a_recording_that_starts_without_a_key_frame(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    whole = write(tmp_path / f"whole_{name}", codec, options, **settings)
    cut = copy(whole, tmp_path / name, lambda number: number >= 5, format=settings.get("container"))
    assert check(cut) < FRAMES - 4


def test_packets_that_are_missing_in_the_middle(tmp_path: Path) -> None:
    for name in ("closed.mp4", "hevc.mp4", "vp9.webm", "vp8.webm", "mpeg4.avi"):
        codec, options, settings = KINDS[name]
        whole = write(tmp_path / f"whole_{name}", codec, options, **settings)
        check(copy(whole, tmp_path / name, lambda number: number not in (7, 8, 12, 25)))


@pytest.mark.parametrize("name", ["closed.mp4", "open.mp4", "closed.mkv", "hevc.mp4", "vp9.mp4"])
def test_frames_that_an_edit_list_hides(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    whole = write(tmp_path / f"whole_{name}", codec, options, **settings)
    count = check(copy(whole, tmp_path / name, lambda number: True, shift=5))
    assert count == (FRAMES if name.endswith("mkv") else FRAMES - 5)


def test_frames_shown_at_one_time(tmp_path: Path) -> None:
    clock = Fraction(1, 1000)
    assert check(write(tmp_path / "a.mkv", clock=clock, times=lambda i: i - i % 2 if i < 20 else i)) == FRAMES


@pytest.mark.parametrize("name", ["transport.mp4", "hevc_transport.mp4", "mpeg2_transport.mp4", "mpeg1.mp4"])
def test_spliced_streams(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    file = write(tmp_path / name, codec, options, **settings)
    file.write_bytes(file.read_bytes() * 2)
    assert check(file) >= 2 * FRAMES - 3


def test_frames_that_change_their_size_are_named(tmp_path: Path) -> None:
    parts = [
        write(tmp_path / f"{size}.ts", options=CLOSED, size=(size, 64), container="mpegts")
        for size in (48, 64)
    ]
    both = tmp_path / "both.mp4"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    for read in (frame_count, read_frames):
        with pytest.raises(UserError, match=r"both\.mp4: its frames change their size"):
            read(both)


@pytest.mark.parametrize(
    "name",
    ["closed.mp4", "closed.mkv", "closed.avi", "transport.mp4", "fragments.mp4", "hevc.mkv", "vp9.webm"]
    + ["mpeg4.avi", "mpeg2_program.mkv", "gif.mp4"],
)
def test_truncated_files(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    content = write(tmp_path / name, codec, options, **settings).read_bytes()
    for share in (0.3, 0.6, 0.9):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        if name == "closed.mp4":  # its index, at the end, is gone
            with pytest.raises(UserError, match=r"closed\.mp4: cannot be read"):
                frame_count(tmp_path / name)
        else:
            assert check(tmp_path / name) <= FRAMES * share + 5


def test_half_a_file_whose_index_names_the_other_half_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", options=OPEN, settings={"movflags": "faststart"})
    file.write_bytes(file.read_bytes()[:-100])
    for read in (frame_count, read_frames):
        with pytest.raises(UserError, match=r"a\.mp4: .* frame \d\d of 40 lies beyond its end\); replace"):
            read(file)


TURNS = {  # display matrix: what a player does to the stored picture
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (0, 1, 1, 0): lambda p: p.swapaxes(0, 1),
}


@pytest.mark.parametrize("name", ["closed.mp4", "open.mp4", "hevc.mp4", "mjpeg.mov", "wide.mp4"])
def test_turned_recordings_are_upright(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    file = write(tmp_path / name, codec, options, **settings)
    stored, content = np.stack(straight(file)), bytearray(file.read_bytes())
    at = content.find(b"tkhd") + 44
    for (a, b, c, d), turn in TURNS.items():
        struct.pack_into(">9i", content, at, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        file.write_bytes(content)
        upright = np.stack([turn(picture) for picture in stored])
        np.testing.assert_array_equal(read_frames(file), upright)
        for wanted in ([0], [39], [3, 0], [5, 30], range(10, 20)):
            np.testing.assert_array_equal(read_frames(file, wanted), upright[list(wanted)])


def box(kind: bytes, *content: bytes) -> bytes:
    """A box of an MP4 file."""
    return struct.pack(">I4s", sum(map(len, content)) + 8, kind) + b"".join(content)


def boxes(data: bytes) -> list[bytes]:
    """The boxes that follow each other in some bytes."""
    found = []
    while data:
        size = struct.unpack(">I", data[:4])[0]
        found.append(data[:size])
        data = data[size:]
    return found


@pytest.mark.parametrize("name", ["closed.mp4", "hevc.mp4"])
def test_a_cover_picture_is_not_the_video(tmp_path: Path, name: str) -> None:
    codec, options, settings = KINDS[name]
    file = write(tmp_path / name, codec, options, **settings)
    expected = straight(file)
    picture = io.BytesIO()
    Image.new("RGB", (160, 90), (200, 200, 200)).save(picture, "JPEG")
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), picture.getvalue()))
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    *rest, index = boxes(file.read_bytes())  # the index is last
    header, *tracks = (part for part in boxes(index[8:]) if part[4:8] != b"udta")
    file.write_bytes(b"".join(rest) + box(b"moov", header, tags, *tracks))
    with av.open(str(file)) as container:
        assert int(container.streams.video[0].disposition) & COVER, "the picture shall come first"
    np.testing.assert_array_equal(straight(file), expected)
    assert check(file) == FRAMES


def test_the_first_of_several_videos_is_read(tmp_path: Path) -> None:
    file = tmp_path / "two.mkv"
    with av.open(str(file), "w") as out:
        streams = [out.add_stream("libx264", rate=25, options=CLOSED) for _ in range(2)]
        for stream, size in zip(streams, (HEIGHT, 2 * HEIGHT)):
            stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
        for number in range(FRAMES):
            for stream in streams:
                picture = scene(number, stream.height, stream.height)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode())
    assert check(file) == FRAMES and read_frames(file, [0]).shape == (1, HEIGHT, HEIGHT, 3)


@pytest.mark.parametrize("name", ["list.mp4", "list.mkv"])
def test_a_playlist_opens_no_other_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / "private.mp4")
    (tmp_path / name).write_text("ffconcat version 1.0\nfile private.mp4\n")
    for read in (frame_count, read_frames):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read(tmp_path / name)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    file = write(tmp_path / "plain.mp4", options=CLOSED)
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4"))
    file.rename(strange)
    assert check(strange) == FRAMES


def test_a_video_that_is_not_the_one_numbered_is_named(tmp_path: Path) -> None:
    for options in (CLOSED, {}):
        numbering = number_video(write(tmp_path / "a.mp4", options=options))
        write(tmp_path / "a.mp4", options=options, frames=20)
        with pytest.raises(UserError, match=r"a\.mp4: has changed since its frames were numbered"):
            read_frames(tmp_path / "a.mp4", [39], numbering)


def test_all_stages_see_the_same_frames(tmp_path: Path) -> None:
    """Stage 1's recordings, and stage 2's clips by fresh numbers and by those in the index."""
    names = ("closed.mp4", "open.mp4", "hevc.mkv", "transport.mp4", "gaps.avi", "vp8_recorder.webm")
    for name in names:
        codec, options, settings = KINDS[name]
        write(tmp_path / name, codec, options, **settings)
    captions = [json.dumps({"video": name, "text": "move"}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(captions))
    said = open_dataset({"format": "videos", "root": str(tmp_path), "captions": "captions.jsonl"}, "all")
    true = {name: np.stack(straight(tmp_path / name)) for name in names}
    for number, name in enumerate(names):
        episode = said.episode(number)
        assert episode.texts == ("move",) and episode.length == len(true[name])
        seen = said.read(episode, range(0, episode.length, 2), ["rgb"])["rgb"]
        np.testing.assert_array_equal(seen, true[name][::2])
    for _ in range(2):
        data = open_dataset({"format": "videos", "root": str(tmp_path)}, "all")
        assert data.lengths.tolist() == [len(true[name]) for name in sorted(true)]
        for number, name in enumerate(sorted(true)):
            for pair in ([0, 5], [38, 39], [11, 30]):
                found = data.read(data.episode(number), pair, data.cameras)
                np.testing.assert_array_equal(found[data.cameras[0]], true[name][pair])
