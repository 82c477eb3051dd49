"""Frames from video files, videos from frames, and the few picture operations that all stages share.

One rule numbers the frames of every file: frame n is the one that decoding from the beginning shows n-th. What
cannot be decoded, or is marked as not to be shown, has no number. A cover picture is not the video, and turned
recordings are set upright. A file is decoded once to number its frames (`number_video`); reading them by their
numbers shows the same pictures, from wherever decoding starts.
"""

import os
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from defi.errors import UserError

# isort: split
import decord  # after torch: loaded before it, decord's libraries take over torch's BLAS, which then crashes

VIDEO_CODEC = {"codec": "libx264", "crf": "18", "preset": "veryfast"}
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # containers that say when each frame is shown
APART = (
    12  # frames, at least, from one place where decoding may start to the next; a thousandth of those before
)
OTHER = "{}: is not as it was when its frames were counted; start again"

Frames = UInt8[np.ndarray, "F H W 3"]


@dataclass(frozen=True)
class Numbering:
    """What it takes to read the frames of a video by their numbers.

    frames: how many there are.
    rate: of them per second, on average; None where the file does not say.
    starts: (frame, time): from this frame to the next start's, decoding from this time on, in ticks of the
        stream's clock, shows what decoding from the beginning (None) shows. Empty: an ordinary video, of which
        decord finds every frame.
    """

    frames: int
    rate: float | None = None
    starts: tuple[tuple[int, int | None], ...] = ()


def frame_count(path: Path) -> int:
    """Number of frames of a video. Raises UserError as `number_video`."""
    return number_video(path).frames


def frame_rate(path: Path) -> float:
    """Frames per second of a video, on average. Raises UserError as `number_video`, or if it does not say."""
    return _told(path, number_video(path).rate)


def read_video(path: Path, every: int = 1) -> tuple[Frames, float]:
    """Every `every`-th frame of a video from the first on, and how many of all its frames come per second.

    Raises:
        UserError: as `number_video`, or it does not say how many come per second.
    """
    pictures, times = [], []
    with _opened(path) as (container, stream):
        for frame in _shown(container, stream):
            if len(times) % every == 0:
                pictures.append(_picture(frame))
            times.append(frame.pts)
        return np.stack(pictures), _told(path, _rate(times, stream))


def read_frames(
    path: Path, indices: Sequence[int] | None = None, numbering: Numbering | None = None
) -> Frames:
    """The frames `indices` of a video (default: all), in that order; repeated indices are fine.

    Args:
        numbering: the file's, where it is known.

    Raises:
        UserError: as `number_video`, or the file is shorter than an index or is no longer the one numbered.
    """
    numbering = numbering or number_video(path)
    wanted = [int(i) for i in (range(numbering.frames) if indices is None else indices)]
    if wanted and not (min(wanted) >= 0 and max(wanted) < numbering.frames):
        raise UserError(f"{path}: has {numbering.frames} frames, frame {max(wanted)} was asked for")
    if numbering.starts:
        return _read(path, wanted, numbering.starts)
    try:
        return decord.VideoReader(str(path), num_threads=1).get_batch(wanted).asnumpy()
    except (decord.DECORDError, RuntimeError, LookupError, ValueError):
        raise UserError(OTHER.format(path)) from None


def _read(path: Path, wanted: Sequence[int], starts: Sequence[tuple[int, int | None]]) -> Frames:
    """Frames of a video by decoding from the last start before each. Raises UserError if one is missing."""

    def start(number: int) -> tuple[int, int | None]:
        first, time = starts[bisect(starts, number, key=lambda start: start[0]) - 1]
        return (0, None) if time is None else (first, time)

    found: dict[int, np.ndarray] = {}
    for (first, time), group in groupby(sorted(set(wanted), key=lambda n: (start(n)[0], n)), start):
        missing = set(group)
        for number, frame in enumerate(_frames_from(path, time), first):
            if number in missing:
                found[number] = _picture(frame)
                missing.remove(number)
            if not missing:
                break
        else:
            raise UserError(OTHER.format(path))
    return np.stack([found[number] for number in wanted])


def number_video(path: Path) -> Numbering:
    """Number the frames of a video by decoding it, once as long as the file does not change.

    Raises:
        UserError: the file is missing, is no video or shows no frame, or its frames change their size.
    """
    return _number(path, os.stat(path).st_mtime_ns if Path(path).is_file() else 0)


@lru_cache(maxsize=200)
def _number(path: Path, changed: int) -> Numbering:
    """Of a file as it is since `changed` (ns)."""
    return _number_ordinary(path) or _number_any(path)


def _number_ordinary(path: Path) -> Numbering | None:
    """Of a video of which decord finds every frame; None: it may not.

    decord takes packets for frames, and the place of a key frame among them for its number. So one stream is
    needed, with a whole frame in each packet, and no key frame across which others are shown or refer.
    """
    with _opened(path) as (container, stream):
        context = stream.codec_context
        if context.name != "h264" or container.format.name not in INDEXED or len(container.streams.video) > 1:
            return None
        prefix = (context.extradata or bytes(5))[4] % 4 + 1
        packets = [
            (p.pts, p.is_keyframe and _is_idr(p, prefix), p.is_keyframe) for p in container.demux(stream)
        ]
    times, starts_anew, is_key = zip(*packets)
    times = times[:-1]  # the last packet is empty
    if None in times or len(set(times)) < len(times) or starts_anew != is_key or not is_key[0]:
        return None
    with _opened(path) as (container, stream):
        shown = []
        for frame in _shown(container, stream):
            if frame.is_corrupt or _matrix(frame) is not None:
                return None
            shown.append(frame.pts)
        found = Numbering(len(shown), _rate(shown, stream))
    if shown != sorted(times):
        return None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        same = list(reader.get_key_indices()) == [place for place, key in enumerate(is_key) if key]
        same = same and len(reader) == len(times)
        return found if same and np.array_equal(reader[len(times) - 1].asnumpy(), _picture(frame)) else None
    except (decord.DECORDError, RuntimeError, ValueError):  # a width that it cannot copy (96 or 144), say
        return None


def _is_idr(packet: av.Packet, prefix: int) -> bool:
    """Whether decoding may start with an H.264 packet, whose units have their length in `prefix` bytes before."""
    data, at = bytes(packet), 0
    while at + prefix < len(data):
        if data[at + prefix] % 32 == 5:
            return True
        at += prefix + int.from_bytes(data[at : at + prefix], "big")
    return False


def _number_any(path: Path) -> Numbering:
    """Of any video, and where reading its frames may start.

    At key frames a second decoder starts and is watched up to the next: from where it shows another picture than
    the one that began with the file, frames are read from the beginning.
    """
    times: list[int | None] = []
    starts: list[tuple[int, int | None]] = [(0, None)]
    second: Iterator[av.VideoFrame] | None = None
    keys: dict[int, int] = {}
    with _opened(path) as (container, stream):
        for number, frame in enumerate(_shown(container, stream, keys)):
            if number == 0:
                _picture(frame)  # of some kinds of pixels it cannot be made
            if second and not _same(frame, second):
                starts.append((number, None))
                second = None
            if frame.pts in keys and number - starts[-1][0] >= max(APART, number // 1000):
                for time in (
                    frame.pts,
                    keys[frame.pts],
                ):  # some containers are searched by one, some by the other
                    other = _frames_from(path, time)
                    if _same(frame, other):
                        starts.append((number, time))
                        second = other
                        break
            times.append(frame.pts)
        return Numbering(len(times), _rate(times, stream), tuple(starts))


def _same(frame: av.VideoFrame, others: Iterator[av.VideoFrame]) -> bool:
    """Whether the next of `others` is this frame."""
    try:
        other = next(others)
    except (StopIteration, UserError):
        return False
    return frame.pts == other.pts and np.array_equal(_picture(frame), _picture(other))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its video. Raises UserError if it has none, or on whatever FFmpeg cannot do with it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video; check the path")
    try:
        with av.open(str(path)) as container:
            streams = (s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
            stream = next(streams, None)
            if stream is None or stream.codec_context is None:
                raise ValueError("it has no stream that can be decoded")
            stream.codec_context.thread_count = 1  # with more, damage shows what the memory held before
            yield container, stream
    except UserError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a video; replace or remove it") from error


def _shown(
    container: InputContainer, stream: VideoStream, keys: dict[int, int] | None = None
) -> Iterator[av.VideoFrame]:
    """What is shown from where the file stands; into `keys` go the times of key frames, and how to seek them.

    Raises:
        UserError: nothing is, or the frames change their size.
    """
    size = None
    for packet in container.demux(stream):
        if keys is not None and packet.is_keyframe and packet.pts is not None:
            keys[packet.pts] = packet.pts if packet.dts is None else packet.dts
        try:
            frames = packet.decode()
        except av.FFmpegError:  # damaged, or what it builds on is missing: not a frame
            continue
        for frame in frames:
            if (size := size or (frame.width, frame.height)) != (frame.width, frame.height):
                raise UserError(f"{container.name}: its frames change their size; cut it where they do")
            yield frame
    if size is None:
        raise ValueError("none of its frames can be decoded")


def _frames_from(path: Path, time: int | None) -> Iterator[av.VideoFrame]:
    """What is shown from a time on, or from the beginning. Raises UserError as `_opened` and `_shown`."""
    with _opened(path) as (container, stream):
        if time is not None:
            container.seek(time, stream=stream)
        yield from _shown(container, stream)


def _picture(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    """Its pixels, turned (by the nearest right angle) and mirrored as the file says."""
    picture = frame.to_ndarray(format="rgb24")
    matrix = _matrix(frame)
    if matrix is None:
        return picture
    (a, b), (c, d) = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Where x and y go: the file's display matrix [[a, b], [c, d]] with x' = ax + cy, y' = bx + dy."""
    found = frame.side_data.get("DISPLAYMATRIX")
    return None if found is None else np.frombuffer(found, np.int32).reshape(3, 3)[:2, :2].astype(int)


def _rate(times: Sequence[int | None], stream: VideoStream) -> float | None:
    """Frames per second: by their times, or what the file says where that is the same to a tick of its clock."""
    said, known = stream.average_rate, set(times) - {None}
    if len(known) > 1 and None not in times:
        seconds = (max(known) - min(known)) * stream.time_base
        if not said or abs((len(known) - 1) / said - seconds) > stream.time_base:
            return float((len(known) - 1) / seconds)
    return float(said) if said else None


def _told(path: Path, rate: float | None) -> float:
    if rate is None:
        raise UserError(
            f"{path}: does not say how many frames come per second; write it anew with a frame rate"
        )
    return rate


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """Write an H.264 video that browsers play (yuv420p, odd sizes padded by a pixel); appears as a whole."""
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(VIDEO_CODEC["codec"], rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {key: VIDEO_CODEC[key] for key in ("crf", "preset")}
        stream.thread_count = 1
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode())
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def to_float(frames: UInt8[np.ndarray, "*F H W 3"]) -> Float[Tensor, "*F 3 H W"]:
    """Pixels 0…255 as channels-first float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*F 3 H W"]) -> UInt8[np.ndarray, "*F H W 3"]:
    """Images in [-1, 1] (others are clipped) as pixels 0…255, channels last."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def resize(images: Float[Tensor, "N C H W"], size: int) -> Float[Tensor, "N C S S"]:
    """Square images of `size` pixels: bilinear with antialiasing; other shapes are squeezed, not cropped."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def prepare_frames(frames: UInt8[np.ndarray, "F H W 3"], size: int) -> Float[Tensor, "F 3 S S"]:
    """What the models eat: pixels as float in [-1, 1], resized to `size`."""
    return resize(to_float(frames), size)


def draw_text(frame: UInt8[np.ndarray, "H W 3"], text: str) -> UInt8[np.ndarray, "H2 W 3"]:
    """The frame with a dark strip below it that holds `text`, wrapped to the frame's width."""
    width = frame.shape[1]
    font = ImageFont.load_default(size=max(9, min(16, width // 16)))
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width - 4:
            lines, line = [*lines, line], word
        else:
            line = longer
    ascent, descent = font.getmetrics()
    step = ascent + descent
    strip = Image.new("RGB", (width, step * len([*lines, line]) + 4), (24, 24, 24))
    draw = ImageDraw.Draw(strip)
    for row, content in enumerate([*lines, line]):
        draw.text((2, 2 + row * step), content, fill=(240, 240, 240), font=font)
    return np.concatenate([frame, np.asarray(strip)])
