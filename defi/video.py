"""Frames from video files, videos from frames, and the few picture operations that all stages share."""

import os
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from defi.errors import UserError

# isort: split
import decord  # after torch: loaded before it, decord's libraries take over torch's BLAS, which then crashes

VIDEO_CODEC = {"codec": "libx264", "crf": "18", "preset": "veryfast"}
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")

Frames = UInt8[np.ndarray, "F H W 3"]


def _open(path: Path) -> decord.VideoReader:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video; check the path")
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        if len(reader) == 0:
            raise ValueError("it has no frames")
        return reader
    except (decord.DECORDError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a video; replace or remove it") from error


def frame_count(path: Path) -> int:
    """Number of frames of a video."""
    return len(_open(path))


def frame_rate(path: Path) -> float:
    """Frames per second of a video.

    Raises:
        UserError: the file is missing or damaged, or does not say.
    """
    rate = float(_open(path).get_avg_fps())
    if not 0 < rate < 1000:
        raise UserError(f"{path}: says {rate} frames per second; write it anew with a frame rate")
    return rate


def read_frames(path: Path, indices: Sequence[int] | None = None) -> Frames:
    """The frames `indices` of a video (default: all), in that order; repeated indices are fine.

    Raises:
        UserError: the file is missing, damaged, or shorter than an index.
    """
    reader = _open(path)
    wanted = [int(i) for i in (range(len(reader)) if indices is None else indices)]
    if wanted and not (min(wanted) >= 0 and max(wanted) < len(reader)):
        raise UserError(f"{path}: has {len(reader)} frames, frame {max(wanted)} was asked for")
    try:
        if wanted and not _seeks_exactly(reader, path, max(wanted)):
            return _read_by_time(path, wanted)
        return reader.get_batch(wanted).asnumpy()
    except (decord.DECORDError, RuntimeError, av.FFmpegError, LookupError, ValueError):
        # Damage; a width that decord cannot copy (96 or 144, say); times that are missing or wrong.
        return _read_in_order(path, wanted)


def _seeks_exactly(reader: decord.VideoReader, path: Path, last: int) -> bool:
    """Whether decord finds all frames up to `last`.

    It takes the place of a key frame in the file, which holds frames in the order of decoding, for its number
    in the order of showing. These are the same where no frame is shown on another side of a key frame.
    """
    keys = list(reader.get_key_indices())
    if last < [*keys, len(reader)][1] and Path(path).suffix.lower() != ".avi":
        return True  # decoding starts at the first frame
    timeline = _timeline(path, os.stat(path).st_mtime_ns)
    return timeline.closed and timeline.keys == keys


@dataclass(frozen=True)
class _Timeline:
    """When the frames of a video are shown, in ticks of its clock, and where decoding can start.

    shown: times of the frames, in order; empty where they are not known or not needed.
    keys: places of the key frames in the file.
    starts: when each key frame is shown, in order, and the time by which seeking finds it.
    closed: whether all frames before a key frame in the file are shown before it, and all after it after.
    """

    shown: np.ndarray
    keys: list[int]
    starts: list[tuple[int, int]]
    closed: bool

    def time(self, number: int) -> int:
        """When a frame is shown; the last one for those that an edit list hides, which are counted too."""
        return int(self.shown[min(number, len(self.shown) - 1)])

    def start(self, time: int) -> int:
        """Where to seek for the frame of a time: the last key frame that is shown no later."""
        return self.starts[max(bisect(self.starts, time, key=lambda start: start[0]) - 1, 0)][1]


@lru_cache(maxsize=200)  # of which an hour of video takes a megabyte, where it is not closed
def _timeline(path: Path, changed: int) -> _Timeline:
    """Of a file as it is since `changed` (ns); its packets are read, not decoded.

    Raises:
        FFmpegError: the file is damaged.
    """
    with av.open(str(path)) as container:
        packets = [
            (packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
            for packet in container.demux(video=0)
            if packet.size
        ]
        codec = container.streams.video[0].codec_context
        made_up = container.format.name == "avi" and codec.has_b_frames  # AVI stores no times
    times, _, is_key, hidden = zip(*packets)
    keys = [place for place, key in enumerate(is_key) if key]
    unknown = np.empty(0, np.int64)
    if made_up or None in times or len(set(times)) < len(times):
        return _Timeline(unknown, keys, [], closed=False)
    latest = list(accumulate(times, max))
    earliest = list(accumulate(reversed(times), min))[::-1]
    if not any(hidden) and all(latest[key] == times[key] == earliest[key] for key in keys):
        return _Timeline(unknown, keys, [], closed=True)
    return _Timeline(
        shown=np.array(sorted(time for time, hide in zip(times, hidden) if not hide)),
        keys=keys,
        starts=sorted((pts, pts if dts is None else dts) for pts, dts, key, _ in packets if key),
        closed=False,
    )


def _read_by_time(path: Path, wanted: Sequence[int]) -> Frames:
    """Frames of a video by seeking to key frames and decoding until the times of the frames come.

    Raises:
        FFmpegError, LookupError, ValueError: the file is damaged, or its times are not those of its frames.
    """
    timeline = _timeline(path, os.stat(path).st_mtime_ns)
    times = [timeline.time(number) for number in wanted]
    found: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for start, group in groupby(sorted(set(times)), timeline.start):
            missing = set(group)
            container.seek(start, stream=stream)
            for frame in container.decode(stream):
                if frame.pts in missing:
                    found[frame.pts] = frame.to_ndarray(format="rgb24")
                    missing.remove(frame.pts)
                if not missing:
                    break
            else:
                raise LookupError(f"no frame at {min(missing)}")
    return np.stack([found[time] for time in times])


def _read_in_order(path: Path, wanted: Sequence[int]) -> Frames:
    """Frames of a video by decoding all that come before them.

    Raises:
        UserError: the video is damaged.
    """
    missing, found = set(wanted), {}
    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in missing:
                    found[number] = frame.to_ndarray(format="rgb24")
                    missing.remove(number)
                if not missing:
                    break
        return np.stack([found[number] for number in wanted])
    except (av.FFmpegError, LookupError, ValueError) as error:
        what = f"frame {min(missing)} cannot be decoded" if missing else "its frames change their size"
        raise UserError(f"{path}: damaged, {what}; replace or remove it") from error


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
