"""Frames from video files, videos from frames, and the few picture operations that all stages share."""

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

from defi.errors import UserError
from defi.film import DECORD_FAULTS, Film, Numbering, named, number_video, open_decord, picture

VIDEO_CODEC = {"codec": "libx264", "crf": "18", "preset": "veryfast"}
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")
CHANGED = "{}: is not as it was when its frames were numbered; start again"

Frames = UInt8[np.ndarray, "F H W 3"]


def frame_count(path: Path) -> int:
    """Number of frames of a video. Raises UserError as `number_video`."""
    return number_video(path).frames


def read_video(path: Path, every: int = 1) -> tuple[Frames, float]:
    """Every `every`-th frame of a video, from its first, and how many of all its frames come per second.

    Raises:
        UserError: as `number_video`, or it does not say how many come per second.
    """
    film = Film(path)
    with named(path):
        pictures = [picture(frame) for number, frame in enumerate(film) if number % every == 0]
    return np.stack(pictures), film.rate()


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
        return open_decord(path).get_batch(wanted).asnumpy()
    except DECORD_FAULTS as error:
        raise UserError(CHANGED.format(path)) from error


def _read(path: Path, wanted: Sequence[int], starts: Sequence[tuple[int, int | None]]) -> Frames:
    """Frames of a video by decoding from the last start before each. Raises UserError if one is missing."""

    def start(number: int) -> tuple[int, int | None]:
        found = starts[bisect(starts, number, key=lambda start: start[0]) - 1]
        return starts[0] if found[1] is None else found

    pictures: dict[int, np.ndarray] = {}
    for (first, time), group in groupby(sorted(set(wanted), key=lambda n: (start(n)[0], n)), start):
        missing = set(group)
        for number, frame in enumerate(Film(path, time), first):
            if number in missing:
                pictures[number] = picture(frame)
                missing.remove(number)
            if not missing:
                break
        else:
            raise UserError(CHANGED.format(path))
    return np.stack([pictures[number] for number in wanted])


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
