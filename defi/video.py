"""Frames of video files by number, videos from frames, and the picture operations that all stages share."""

import os
from bisect import bisect
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from defi.errors import UserError, reading
from defi.frame_numbers import FIX, Numbering, VideoFile, number_video, upright

VIDEO_CODEC = {"codec": "libx264", "crf": "18", "preset": "veryfast"}
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")

Frames = UInt8[np.ndarray, "F H W 3"]


def frame_count(path: Path) -> int:
    """Number of frames of a video. Raises UserError as `VideoFile`."""
    return number_video(path).frames


def read_video(path: Path, every: int = 1) -> tuple[Frames, float]:
    """Every `every`-th frame of a video, from its first, and how many of all its frames come per second.

    Raises:
        UserError: as `VideoFile`, or it does not say how many come per second.
    """
    video = VideoFile(path)
    with reading(path, FIX):
        pictures = [upright(frame) for number, frame in enumerate(video) if number % every == 0]
    return np.stack(pictures), video.rate()


def read_frames(
    path: Path, indices: Sequence[int] | None = None, numbering: Numbering | None = None
) -> Frames:
    """The frames `indices` of a video (default: all), in that order; repeated indices are fine.

    Each is decoded from the last start before it.

    Args:
        numbering: the file's, where it is known.

    Raises:
        UserError: as `VideoFile`, or the file is shorter than an index or is no longer the one numbered.
    """
    numbering = numbering or number_video(path)
    wanted = [int(i) for i in (range(numbering.frames) if indices is None else indices)]
    if wanted and not (min(wanted) >= 0 and max(wanted) < numbering.frames):
        raise UserError(f"{path}: has {numbering.frames} frames, frame {max(wanted)} was asked for")

    def start(number: int) -> tuple[int, int | None]:
        found = numbering.starts[bisect(numbering.starts, number, key=lambda start: start[0]) - 1]
        return numbering.starts[0] if found[1] is None else found

    pictures: dict[int, np.ndarray] = {}
    for (first, time), group in groupby(sorted(set(wanted), key=lambda n: (start(n)[0], n)), start):
        missing = set(group)
        with reading(path, FIX):
            for number, frame in enumerate(VideoFile(path, time), first):
                if number == first and time is not None and frame.pts < time:
                    break
                if number in missing:
                    pictures[number] = upright(frame)
                    missing.remove(number)
                if not missing:
                    break
        if missing:
            raise UserError(f"{path}: has changed since its frames were numbered; start again")
    return np.stack([pictures[number] for number in wanted])


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """Write an H.264 video that browsers play (yuv420p, odd sizes padded by a pixel); it appears complete."""
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
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 4:
            lines.append(word)
        else:
            lines[-1] = longer
    height = sum(font.getmetrics())
    strip = Image.new("RGB", (width, height * len(lines) + 4), (24, 24, 24))
    draw = ImageDraw.Draw(strip)
    for row, line in enumerate(lines):
        draw.text((2, 2 + row * height), line, fill=(240, 240, 240), font=font)
    return np.concatenate([frame, np.asarray(strip)])
