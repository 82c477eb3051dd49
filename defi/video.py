"""Frames of videos by number, videos from frames, and the picture operations that all stages share.

Frame n is the n-th that decoding from the beginning shows. What cannot be decoded, or is hidden, has no
number. A cover picture is not the video. A file is decoded once to number its frames, and to find where else
decoding may start and show the same pictures. Of videos whose frames keep a clock (`TimedVideo`) it suffices
to look at the container.
"""

import os
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from threading import Lock

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from defi.errors import UserError, reading

VIDEO_CODEC = {"codec": "libx264", "crf": "18", "preset": "veryfast"}
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm")
# FFmpeg goes by the content: a playlist named like a video would make it open other files.
CONTAINERS = "apng,asf,avi,dv,flv,gif,h264,hevc,ivf,live_flv,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,"
CONTAINERS += "mxf,nut,obu,ogg,rm,vc1,vvc,wtv,yuv4mpegpipe"
OPEN = 24  # videos that a process keeps open, with a few megabytes each
APART = 12  # frames, at least, between places where reading starts; or a thousandth of all before
FIX = "replace or remove it"

Frames = UInt8[np.ndarray, "F H W 3"]


@dataclass(frozen=True)
class Numbering:
    """What it takes to read the frames of a video by number.

    frames: how many there are.
    starts: (frame, time): from this frame to the next start's, decoding from this time on (in ticks of the
        stream; None: from the beginning) shows the right pictures.
    rate: frames per second; None: it states none.
    """

    frames: int
    starts: tuple[tuple[int, int | None], ...]
    rate: float | None

    def fps(self, path: Path) -> float:
        """Frames per second. UserError, which names the file, if it states none."""
        if self.rate is None:
            raise UserError(f"{path}: states no frames per second; write it again with a frame rate")
        return self.rate


class VideoFile:
    """A video, decoded from its beginning or from a time (in ticks of its stream). Iterating yields frames.

    So far: `times` holds when each is shown, `keys` when each key frame is shown and when it is decoded.

    Raises:
        UserError: the file is missing, truncated, no video or shows no frame, or frames change their size.
    """

    def __init__(self, path: Path, time: int | None = None) -> None:
        self.path, self.times, self.keys = path, [], {}
        with reading(path, FIX):
            if not Path(path).is_file():  # FFmpeg would take some names for addresses
                raise FileNotFoundError
            self.container = av.open(str(path), options={"format_whitelist": CONTAINERS})
            videos = self.container.streams.video
            self.stream = next((s for s in videos if not s.disposition & Disposition.attached_pic), None)
            if self.stream is None or self.stream.codec_context is None:
                raise ValueError("it has no stream that can be decoded")
            self.stream.codec_context.thread_count = 1  # with more, damage shows what the memory held before
            index, end = self.stream.index_entries, os.path.getsize(path)
            if self.stream.frames and len(index) and index[-1].pos + index[-1].size > end:  # half a download
                there = sum(entry.pos + entry.size <= end for entry in index)
                raise ValueError(f"truncated: frame {there + 1} of {len(index)} lies beyond its end")
            self._stated_rate, self._tick = self.stream.average_rate, self.stream.time_base
            if time is not None:
                self.container.seek(time, stream=self.stream)

    def __iter__(self) -> Iterator[av.VideoFrame]:
        size = None
        demux = self.container.demux(self.stream)
        with reading(self.path, FIX), closing(self.container), closing(demux):  # not left to the collector
            for packet in demux:
                if packet.is_keyframe and None not in (packet.pts, packet.dts):
                    self.keys[packet.pts] = packet.dts
                frames = []
                with suppress(av.FFmpegError):  # it is damaged, or what it builds on is missing: no frame
                    frames = packet.decode()
                for frame in frames:
                    if (size := size or (frame.width, frame.height)) != (frame.width, frame.height):
                        raise UserError(f"{self.path}: its frames change their size; split it where they do")
                    self.times.append(frame.pts)
                    yield frame
            if not self.times:
                raise ValueError("it shows no frame")

    def rate(self) -> float | None:
        """Frames per second so far, by when they are shown; the stated rate where both agree to a tick.

        None: it states no rate, and its frames no times.
        """
        stated, known = self._stated_rate, set(self.times)
        if len(known) > 1 and None not in known:
            seconds = (max(known) - min(known)) * self._tick
            if not stated or abs((len(known) - 1) / stated - seconds) > self._tick:
                return float((len(known) - 1) / seconds)
        return float(stated) if stated else None


class TimedVideo(VideoFile):
    """A video kept open, whose frame n is shown n / fps seconds after its first; read in any order.

    frames: how many its container has. Safe in threads, not across a fork (`timed_video`).

    Raises:
        UserError: as `VideoFile`, or the container says that the frames come at another rate.
    """

    def __init__(self, path: Path, fps: float) -> None:
        super().__init__(path)
        with reading(path, FIX):
            self._index, times = self.stream.index_entries, []
            if self.stream.frames and len(self._index) == self.stream.frames:  # when each is decoded
                times = [self._index[0].timestamp, self._index[-1].timestamp]
                self.frames = len(self._index)
            else:  # a container without one: look at all packets
                packets = self.container.demux(self.stream)
                times = sorted(packet.pts for packet in packets if packet.pts is not None)
                self.frames = len(times)
            if not times:
                raise ValueError("it shows no frame")
            self._apart = 1 / (fps * self._tick)  # ticks from frame to frame
            self._first = self.stream.start_time or 0
            apart = (times[-1] - times[0]) / max(1, self.frames - 1)
            if self.frames > 1 and abs(apart - self._apart) * (self.frames - 1) > self._apart / 2:
                rate = float(1 / (apart * self._tick)) if apart else 0
                raise ValueError(f"{self.frames} frames at {rate:g} per second, not at {fps:g}")
        self._lock, self._shown = Lock(), None
        self._decoded: Iterator[av.VideoFrame] = iter(())
        self._convert = VideoReformatter()

    def read(self, numbers: Sequence[int]) -> Frames:
        """Frames by number, in that order. UserError: one is missing, damaged or not at its time."""
        pictures: dict[int, np.ndarray] = {}
        with self._lock, reading(self.path, FIX):
            for number in sorted(set(numbers)):
                if not 0 <= number < self.frames:
                    raise ValueError(f"has {self.frames} frames, frame {number} was asked for")
                pictures[number] = upright(self._frame(number), self._convert)
        return np.stack([pictures[number] for number in numbers])

    def _frame(self, number: int) -> av.VideoFrame:
        time, half = self._first + number * self._apart, self._apart / 2
        key = self._index.search_timestamp(round(time))
        ahead = self._shown is not None and self._shown.pts <= time + half
        if not ahead or key < 0 or self._index[key].timestamp > self._shown.pts:
            self._seek(time, half)
        while self._shown.pts < time - half:
            self._shown = next(self._decoded, None)
            if self._shown is None or self._shown.pts is None:
                break
        if self._shown is None or self._shown.pts is None or self._shown.pts > time + half:
            self._shown = None
            raise ValueError(f"shows no frame {number}, {float(time * self._tick):.3f} s from its start")
        return self._shown

    def _seek(self, time: float, half: float) -> None:
        """Decode from a key frame that is shown no later: where frames are shown in another order than they
        are decoded in, the nearest one may be."""
        for back in (0, 4, 64, 1024, None):
            to = self._first if back is None else round(time - back * self._apart)
            self.container.seek(max(to, self._first), stream=self.stream)
            self._decoded = self.container.decode(self.stream)
            self._shown = next(self._decoded, None)
            if self._shown is None or self._shown.pts is None:
                raise ValueError("cannot be decoded")
            if self._shown.pts <= time + half or to <= self._first:
                return


def timed_video(path: Path, fps: float) -> TimedVideo:
    """Of this process, kept open as long as few others are asked for and the file does not change."""
    with reading(path, FIX):
        return _timed(path, fps, os.stat(path).st_mtime_ns, os.getpid())  # a fork shares the file's position


@lru_cache(maxsize=OPEN)
def _timed(path: Path, fps: float, changed: int, process: int) -> TimedVideo:
    return TimedVideo(path, fps)


def upright(frame: av.VideoFrame, convert: VideoReformatter | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """A frame's pixels, turned (by the nearest right angle) and mirrored as the file says.

    Its display matrix [[a, b], [c, d]] moves pixel (x, y) to (ax + cy, bx + dy). convert: kept from frame to
    frame, it takes a third of the time.
    """
    colours = {"format": "rgb24", "threads": 1}  # there are other workers
    pixels = (convert.reformat(frame, **colours) if convert else frame).to_ndarray(**colours)
    if (matrix := frame.side_data.get(Type.DISPLAYMATRIX)) is None:
        return pixels
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def number_video(path: Path) -> Numbering:
    """Number the frames of a video by decoding it, once as long as the file does not change."""
    with reading(path, FIX):
        return _number(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=200)
def _number(path: Path, changed: int) -> Numbering:
    """Of a file as it is since `changed` (ns).

    At key frames a second decoder starts and is watched up to the next: from where it shows something else
    than the one that began with the file, frames are read from the beginning.
    """
    video, second = VideoFile(path), None
    starts: list[tuple[int, int | None]] = [(0, None)]
    for number, frame in enumerate(video):
        if number == 0:
            upright(frame)  # fails for pixels that no picture can be made of
        if second and not _same(frame, next(second, None)):
            starts.append((number, None))
            second = None
        if frame.pts in video.keys and number - starts[-1][0] >= max(APART, number // 1000):
            for time in (frame.pts, video.keys[frame.pts]):  # some containers are searched by the other
                with suppress(UserError):
                    other = iter(VideoFile(path, time))
                    if _same(frame, next(other, None)):
                        starts.append((number, time))
                        second = other
                        break
    return Numbering(len(video.times), tuple(starts), video.rate())


def _same(one: av.VideoFrame, other: av.VideoFrame | None) -> bool:
    if other is None or one.pts != other.pts:
        return False
    planes = zip(one.planes, other.planes)  # quick to compare, but there may be anything beside the picture
    same = all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in planes)
    return same or np.array_equal(upright(one), upright(other))


def frame_count(path: Path) -> int:
    """Number of frames of a video. Raises UserError as `VideoFile`."""
    return number_video(path).frames


def read_frames(
    path: Path, indices: Sequence[int] | None = None, numbering: Numbering | None = None
) -> Frames:
    """The frames `indices` of a video (default: all), in that order; repeated indices are fine.

    Each is decoded from the last start before it. numbering: the file's, where it is known.
    """
    numbering = numbering or number_video(path)
    wanted = [int(i) for i in (range(numbering.frames) if indices is None else indices)]
    if wanted and not (min(wanted) >= 0 and max(wanted) < numbering.frames):
        raise UserError(f"{path}: has {numbering.frames} frames, frame {max(wanted)} was asked for")

    groups: dict[tuple[int, int | None], set[int]] = {}
    for number in wanted:
        start = numbering.starts[bisect(numbering.starts, number, key=lambda start: start[0]) - 1]
        groups.setdefault(numbering.starts[0] if start[1] is None else start, set()).add(number)
    pictures: dict[int, np.ndarray] = {}
    for (first, time), missing in groups.items():
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


@contextmanager
def film(path: Path, fps: float) -> Iterator[Callable[[Frames], None]]:
    """What takes the frames of an H.264 video that browsers play (yuv420p, odd sizes padded by a pixel), as
    many at a time as one likes, all of one size. It appears at the end, complete, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream(VIDEO_CODEC["codec"], rate=Fraction(fps).limit_denominator(1000))
            stream.pix_fmt = "yuv420p"
            stream.options = {key: VIDEO_CODEC[key] for key in ("crf", "preset")}
            stream.thread_count = 1

            def write(frames: Frames) -> None:
                odd = [(0, side % 2) for side in frames.shape[1:3]]
                frames = np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge")
                if not stream.codec_context.is_open:
                    stream.height, stream.width = frames.shape[1:3]
                for frame in frames:
                    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    container.mux(stream.encode(picture))

            yield write
            container.mux(stream.encode())
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """A video of frames that are all there, as `film` writes it."""
    with film(path, fps) as write:
        write(frames)


def to_float(frames: UInt8[np.ndarray, "*F H W 3"]) -> Float[Tensor, "*F 3 H W"]:
    """Pixels 0…255 as channels-first float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*F 3 H W"]) -> UInt8[np.ndarray, "*F H W 3"]:
    """Images in [-1, 1] (others are clipped) as pixels 0…255, channels last."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def resize(images: Float[Tensor, "N C H W"], size: int | tuple[int, int]) -> Float[Tensor, "N C H2 W2"]:
    """Images of another size, in pixels: height and width, or square. Bilinear with antialiasing; other
    shapes are squeezed, not cropped."""
    shape = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == shape:
        return images
    return F.interpolate(images, shape, mode="bilinear", antialias=True, align_corners=False)


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
