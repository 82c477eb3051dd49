"""Which samples there are in demonstrations in CALVIN's format, and the samples, straight from it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float32, Int64, UInt8
from rich.progress import track
from torch.utils.data import Dataset

from defi.calvin import CalvinFolder, Span, check_gripper
from defi.errors import UserError
from defi.processes import print_once, processes, share
from Step3_DeFI.observation import CAMERAS, observe

READERS = 4  # frames that a process reads at the same time

Look = tuple[int, int]  # frame, number of the instruction (-1 where the input does not depend on it)


@dataclass
class Plan:
    """Which samples there are: N starts of chunks, and the distinct looks they need.

    actions: [dx, dy, dz] / 0.02 m, [droll, dpitch, dyaw] / 0.05 rad, gripper +1 open, −1 closed.
    robot_obs: TCP xyz in m, TCP Euler angles in rad, finger width in m, 7 joints in rad, last gripper action.
    """

    looks: list[Look]
    index: Int64[np.ndarray, "N 2"]  # look, instruction
    actions: Float32[np.ndarray, "N K A"]
    robot_obs: Float32[np.ndarray, "N 15"]  # at the sample's frame
    spans: Int64[np.ndarray, "N 2"]  # number of the annotated span (-1: none), frame
    video: Int64[np.ndarray, "N F"] | None  # looks at the frames that follow
    texts: list[str]
    tasks: dict[str, int]


@dataclass(frozen=True)
class Starts:
    """Frames of one demonstration at which samples start, in order; `number` is its annotation's, or -1."""

    number: int
    span: Span
    frames: Sequence[int]


def following(frames: int, apart: int | None) -> range | None:
    """Frames of the clip that is kept with a sample, counted from its own; None: no clip.

    Raises:
        UserError: `apart` is no distance.
    """
    if apart is not None and apart < 1:
        raise UserError(f"gfdm.frame_step={apart}: frames between the frames of a clip, must be 1 or more")
    return None if apart is None else range(0, frames * apart, apart)


def choose_starts(data: CalvinFolder, *, chunk: int, tail: int, stride: int, spans: str) -> list[Starts]:
    """Where samples start: see `plan_samples`. A printed line tells of spans too short for `tail`.

    Raises:
        UserError: a setting is none of those that there are, `tail` leaves no room for a chunk, no span is
            long enough, or (`all`) no recording.
    """
    if spans not in ("annotated", "all"):
        raise UserError(f"data.spans={spans}: choose annotated or all")
    if stride < 1:
        raise UserError(f"data.stride={stride}: must be 1 or more")
    if tail < chunk - 1:
        raise UserError(f"data.tail={tail}: a chunk has {chunk} actions; set data.tail={chunk - 1} or more")
    all_frames = spans == "all"
    fate = "taken without text" if all_frames else "left out"
    annotated = [] if all_frames and not data.is_annotated else list(enumerate(data.spans))
    known = {number: span for number, span in annotated if not span.fault}
    if annotated:
        print_once(data.missing_text_note(fate=fate))
        if not known and not all_frames:
            raise UserError(annotated[0][1].fault)
    starts = [Starts(n, s, range(s.start, s.end - tail + 1, stride)) for n, s in known.items()]
    starts = [each for each in starts if each.frames]
    if not starts and not all_frames:
        raise UserError(f"{data.folder}: no annotated span is longer than data.tail={tail} frames; lower it")
    if told := too_short(list(known.values()), starts, chunk=chunk, tail=tail, fate=fate):
        print_once(f"{data.folder}: {told}")
    if all_frames:
        starts += other_starts(data, list(known.values()), chunk=chunk, tail=tail, stride=stride)
    if not starts:
        raise UserError(f"{data.folder}: no recording has the {chunk} frames of a chunk; give longer ones")
    return starts


def too_short(spans: Sequence[Span], starts: Sequence[Starts], *, chunk: int, tail: int, fate: str) -> str:
    """What to tell of annotated spans that no sample with their text starts in; "" if there are none."""
    short = [span for span in spans if span.end - span.start < tail]
    if not short:
        return ""
    told = f"{len(short)} of {len(spans)} annotated spans are too short for data.tail={tail}: {fate}"
    if lost := sorted({span.task for span in short} - {each.span.task for each in starts}):
        told += f"; tasks without any sample: {', '.join(lost)}"
    if long_enough := sum(span.end - span.start >= chunk - 1 for span in short):
        told += f"; data.tail={chunk - 1} takes {long_enough} of them"
    return told


def other_starts(
    data: CalvinFolder, spans: Sequence[Span], *, chunk: int, tail: int, stride: int
) -> list[Starts]:
    """The frames of every recording that lie in no span's s … e − tail; without instruction."""
    taken = [frame for span in spans for frame in range(span.start, span.end - tail + 1)]
    annotated = np.array(taken, np.int64)
    found = []
    for start, end in data.episodes:
        frames = np.setdiff1d(np.arange(start, end - chunk + 2, stride), annotated)
        found.append(Starts(-1, Span(start, end, "", ""), frames.tolist()))
    return [starts for starts in found if starts.frames]


def plan_samples(
    data: CalvinFolder,
    *,
    chunk: int,
    tail: int,
    stride: int,
    by_text: bool,
    video: range | None = None,
    spans: str = "annotated",
) -> Plan:
    """Samples start at s … e − tail of every annotated span (s, e); sample i has `chunk` actions from i on.

    Processes share the reading; each gets the whole plan. `video`: frames of the clip that is kept with each
    sample, counted from its own; past e, e is repeated. `spans`: with `all`, the recordings' other frames
    follow as samples whose instruction is empty; there need be no annotation.

    Raises:
        UserError: as `choose_starts`; or frames are missing.
    """
    starts = choose_starts(data, chunk=chunk, tail=tail, stride=stride, spans=spans)
    needed = {n: range(each.frames[0], each.frames[-1] + chunk) for n, each in enumerate(starts)}
    data.check_frames(np.unique(np.concatenate([np.array(frames) for frames in needed.values()])))
    motions = read_motions(data, needed)
    looks: dict[Look, int] = {}
    texts: dict[str, int] = {}
    index, actions, robot_obs, clips, tasks = [], [], [], [], {}
    for each, (taken, states) in zip(starts, motions.values()):
        span, first = each.span, each.frames[0]
        text = texts.setdefault(span.instruction, len(texts))
        for frame in each.frames:
            look = looks.setdefault((frame, text if by_text else -1), len(looks))
            index.append((look, text))
            actions.append(taken[frame - first : frame - first + chunk])
            robot_obs.append(states[frame - first])
            later = [min(frame + offset, span.end) for offset in video or ()]
            clips.append([looks.setdefault((next_frame, -1), len(looks)) for next_frame in later])
        if span.task:
            tasks[span.task] = tasks.get(span.task, 0) + len(each.frames)
    return Plan(
        looks=list(looks),
        index=np.array(index, np.int64),
        actions=np.stack(actions),
        robot_obs=np.stack(robot_obs),
        spans=np.array([(each.number, frame) for each in starts for frame in each.frames], np.int64),
        video=None if video is None else np.array(clips, np.int64),
        texts=list(texts),
        tasks=tasks,
    )


Motion = tuple[Float32[np.ndarray, "n 7"], Float32[np.ndarray, "n 15"]]


def read_motions(data: CalvinFolder, spans: dict[int, range]) -> dict[int, Motion]:
    """Relative actions and robot states of each span's frames; every process reads a part and gets all.

    Raises:
        UserError: an action or state is no number or absurd; the frame's file is named.
    """
    keys = ("rel_actions", "robot_obs")

    def read(item: tuple[int, range]) -> tuple[int, Motion]:
        frames = [data.frame(frame, keys) for frame in item[1]]
        for number, frame in zip(item[1], frames):
            check_gripper(data.path(number), frame["rel_actions"])
        return item[0], tuple(np.stack([frame[key] for frame in frames]).astype(np.float32) for key in keys)

    own, quiet = share(list(spans.items())), not processes().is_local_main_process
    with ThreadPoolExecutor(READERS) as pool:  # of CALVIN a million small files: minutes
        found = track(pool.map(read, own), "actions", total=len(own), transient=True, disable=quiet)
        return dict(sorted(gather_object(list(found))))


class CalvinSamples(Dataset):
    """Samples straight from a folder or zip: what a store of kind `images` yields, without one.

    Each sample decompresses its frames; a store reads several times as many per second. `video`: see
    `plan_samples`; None: samples without one.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        image_size: int,
        chunk: int = 10,
        tail: int = 21,
        stride: int = 1,
        spans: str = "annotated",
        video: range | None = None,
    ) -> None:
        self.data, self.image_size = CalvinFolder(folder), image_size
        self.plan = plan_samples(
            self.data, chunk=chunk, tail=tail, stride=stride, by_text=False, video=video, spans=spans
        )
        self.texts = self.plan.texts

    @property
    def fingerprint(self) -> str:
        """That of the store: the samples are the same."""
        return f"{self.data.fingerprint}-images-{len(self)}"

    def __len__(self) -> int:
        return len(self.plan.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{images uint8 [V, 3, H, W], text, actions [K, A]}, and `video` uint8 [V, F, 3, H, W] if wanted."""
        look, text = self.plan.index[i]
        found = {
            "images": self._images([look])[0],
            "text": self.plan.texts[text],
            "actions": torch.from_numpy(self.plan.actions[i].copy()),
        }
        if self.plan.video is not None:
            distinct, place = np.unique(self.plan.video[i], return_inverse=True)
            found["video"] = self._images(distinct)[place].transpose(0, 1)
        return found

    def _images(self, looks: Sequence[int]) -> UInt8[torch.Tensor, "N V 3 H W"]:
        return read_looks(self.data, [self.plan.looks[look][0] for look in looks], self.image_size)


def read_looks(
    data: CalvinFolder, frames: Sequence[int], size: int
) -> UInt8[torch.Tensor, "N V 3 size size"]:
    """Both cameras' pictures of some frames, as the policy sees them."""
    with ThreadPoolExecutor(READERS) as pool:
        return torch.stack(list(pool.map(lambda frame: observe(data.frame(frame, CAMERAS), size), frames)))
