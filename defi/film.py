"""The frames of a video file and their numbers: one rule for every kind of file.

Frame n is the n-th that decoding from the beginning shows. What cannot be decoded, or is hidden, has no
number. A cover picture is not the video. Turned recordings are set upright. A file is decoded once to number
its frames, and to find out where else decoding may start and show the same pictures.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import torch  # noqa: F401, before decord: else decord's libraries take over its BLAS, which then crashes
from av.sidedata.sidedata import Type
from av.stream import Disposition
from jaxtyping import UInt8

from defi.errors import UserError

# isort: split
import decord

INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # containers in which decord finds its way
DECORD_FAULTS = (decord.DECORDError, RuntimeError, LookupError, ValueError)
# FFmpeg goes by the content: with a playlist under a film's name it would open other files.
CONTAINERS = "apng,asf,avi,dv,flv,gif,h264,hevc,ivf,live_flv,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,"
CONTAINERS += "mxf,nut,obu,ogg,rm,vc1,vvc,wtv,yuv4mpegpipe"
APART = 12  # frames, at least, between places where reading starts; or a thousandth of all before


@dataclass(frozen=True)
class Numbering:
    """What it takes to read the frames of a video by number.

    frames: how many there are.
    starts: (frame, time): from this frame to the next start's, decoding from this time on (in ticks of the
        stream; None: from the beginning) shows the right pictures. Empty: decord finds every frame.
    """

    frames: int
    starts: tuple[tuple[int, int | None], ...] = ()


class Film:
    """A video file, to be decoded from a time (in ticks of its stream) or from the beginning.

    Iterating yields its frames. So far: `times` holds when these are shown, `keys` when key frames are shown
    and by what time else they may be found.

    Raises:
        UserError: the file is missing or half of it is, is no video or shows no frame, or its frames change
            their size.
    """

    def __init__(self, path: Path, time: int | None = None) -> None:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such video; check the path")
        self.path, self.times, self.keys = path, [], {}
        with named(path):
            self.container = av.open(str(path), options={"format_whitelist": CONTAINERS})
            videos = self.container.streams.video
            self.stream = next((s for s in videos if not s.disposition & Disposition.attached_pic), None)
            if self.stream is None or self.stream.codec_context is None:
                raise ValueError("it has no stream that can be decoded")
            self.stream.codec_context.thread_count = 1  # with more, damage shows what the memory held before
            self._refuse_cut()
            if time is not None:
                self.container.seek(time, stream=self.stream)

    def _refuse_cut(self) -> None:
        """Raise UserError for half a file, say a broken download, whose index names the other half too."""
        index, end = self.stream.index_entries, os.path.getsize(self.path)
        if self.stream.frames and len(index) and index[-1].pos + index[-1].size > end:
            there = sum(entry.pos + entry.size <= end for entry in index)
            said = f"damaged, frame {there + 1} of {len(index)} lies beyond its end"
            raise UserError(f"{self.path}: {said}; replace or remove it")

    def __iter__(self) -> Iterator[av.VideoFrame]:
        size = None
        with named(self.path):
            for packet in self.container.demux(self.stream):
                if packet.is_keyframe and None not in (packet.pts, packet.dts):
                    self.keys[packet.pts] = packet.dts
                frames = []
                with suppress(av.FFmpegError):  # it is damaged, or what it builds on is missing: no frame
                    frames = packet.decode()
                for frame in frames:
                    if (size := size or (frame.width, frame.height)) != (frame.width, frame.height):
                        raise UserError(f"{self.path}: its frames change their size; cut it where they do")
                    self.times.append(frame.pts)
                    yield frame
            if not self.times:
                raise ValueError("it shows no frame")

    def rate(self) -> float:
        """Frames per second so far, by when they are shown; what the file says if that is the same to a tick.

        Raises:
            UserError: neither is known.
        """
        said, known = self.stream.average_rate, set(self.times)
        if len(known) > 1 and None not in known:
            seconds = (max(known) - min(known)) * self.stream.time_base
            if not said or abs((len(known) - 1) / said - seconds) > self.stream.time_base:
                return float((len(known) - 1) / seconds)
        if not said:
            raise UserError(f"{self.path}: says no frames per second; write it anew with a frame rate")
        return float(said)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file that FFmpeg fails with."""
    try:
        yield
    except UserError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a video; replace or remove it") from error


def picture(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    """What is to be seen: pixels, turned (by the nearest right angle) and mirrored as the file says.

    Its display matrix [[a, b], [c, d]] moves pixel (x, y) to (ax + cy, bx + dy).
    """
    pixels = frame.to_ndarray(format="rgb24")
    if (matrix := frame.side_data.get(Type.DISPLAYMATRIX)) is None:
        return pixels
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def number_video(path: Path) -> Numbering:
    """Number the frames of a video by decoding it, once as long as the file does not change.

    Raises:
        UserError: as `Film`.
    """
    return _number(path, os.stat(path).st_mtime_ns if Path(path).is_file() else 0)


@lru_cache(maxsize=200)
def _number(path: Path, changed: int) -> Numbering:
    """Of a file as it is since `changed` (ns)."""
    with named(path):  # pictures cannot be made of some kinds of pixels
        return _number_ordinary(path) or _number_any(path)


def _number_ordinary(path: Path) -> Numbering | None:
    """Of a video in which decord finds every frame; None: it may not.

    decord counts packets, and takes the place of a key frame among them for its number. So there must be one
    stream, a whole frame in each packet, and no key frame across which others are shown or refer.
    """
    film = Film(path)
    context, container = film.stream.codec_context, film.container
    if context.name != "h264" or container.format.name not in INDEXED or len(container.streams.video) > 1:
        return None
    prefix = (context.extradata or b"").ljust(5, b"\0")[4] % 4 + 1
    packets = [(p.pts, p.is_keyframe, _is_idr(p, prefix)) for p in container.demux(film.stream)][:-1]
    times, is_key, is_idr = zip(*packets) if packets else ((), (), ())
    if None in times or len(set(times)) < len(times) or is_key != is_idr or not any(is_key[:1]):
        return None
    film = Film(path)
    for frame in film:
        if frame.is_corrupt or frame.side_data.get(Type.DISPLAYMATRIX) is not None:
            return None
    if film.times != sorted(times):
        return None
    try:
        reader = open_decord(path)
        same = list(reader.get_key_indices()) == [place for place, key in enumerate(is_key) if key]
        same = same and np.array_equal(reader[len(times) - 1].asnumpy(), picture(frame))
    except DECORD_FAULTS:  # a width that it cannot copy, say
        return None
    return Numbering(len(times)) if same else None


def _is_idr(packet: av.Packet, prefix: int) -> bool:
    """Whether an H.264 packet builds on no other; it holds units, each after its length in `prefix` bytes."""
    data, at = bytes(packet), 0
    while at + prefix < len(data):
        if data[at + prefix] % 32 == 5:
            return True
        at += prefix + int.from_bytes(data[at : at + prefix], "big")
    return False


def _number_any(path: Path) -> Numbering:
    """Of any video, and where reading its frames may start.

    At key frames a second decoder starts and is watched up to the next: from where it shows something else
    than the one that began with the file, frames are read from the beginning.
    """
    film, second = Film(path), None
    starts: list[tuple[int, int | None]] = [(0, None)]
    for number, frame in enumerate(film):
        if number == 0:
            picture(frame)  # so that its pixels are known to be of a kind that it is made of
        if second and not _same(frame, next(second, None)):
            starts.append((number, None))
            second = None
        if frame.pts in film.keys and number - starts[-1][0] >= max(APART, number // 1000):
            for time in (frame.pts, film.keys[frame.pts]):  # some containers are searched by the other
                with suppress(UserError):
                    other = iter(Film(path, time))
                    if _same(frame, next(other, None)):
                        starts.append((number, time))
                        second = other
                        break
    return Numbering(len(film.times), tuple(starts))


def _same(one: av.VideoFrame, other: av.VideoFrame | None) -> bool:
    if other is None or one.pts != other.pts:
        return False
    planes = zip(one.planes, other.planes)  # quick to compare, but there may be anything beside the picture
    same = all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in planes)
    return same or np.array_equal(picture(one), picture(other))


def open_decord(path: Path) -> decord.VideoReader:
    """The fast reader. Raises DECORDError, RuntimeError or ValueError."""
    return decord.VideoReader(str(path), num_threads=1)
