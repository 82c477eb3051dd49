"""Which samples there are in demonstrations in CALVIN's format, and the samples, straight from it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float32, Int64
from torch.utils.data import Dataset

from defi.calvin import CalvinFolder
from defi.errors import UserError
from defi.processes import processes
from Step3_DeFI.observation import CAMERAS, observe

READERS = 4  # frames that a process reads at the same time

Look = tuple[int, int]  # frame, number of the instruction (-1 where the input does not depend on it)


@dataclass
class Plan:
    """Which samples there are: N starts of chunks, and the distinct looks they need."""

    looks: list[Look]
    index: Int64[np.ndarray, "N 2"]  # look, instruction
    actions: Float32[np.ndarray, "N K A"]
    robot_obs: Float32[np.ndarray, "N 15"]  # at the sample's frame
    spans: Int64[np.ndarray, "N 2"]  # number of the annotated span, frame
    video: Int64[np.ndarray, "N F"] | None  # looks at the frames that follow
    texts: list[str]
    tasks: dict[str, int]


def plan_samples(
    data: CalvinFolder, *, chunk: int, tail: int, stride: int, by_text: bool, video: range | None = None
) -> Plan:
    """Samples start at s … e − tail of every annotated span (s, e); sample i has `chunk` actions from i on.

    Processes share the reading; each gets the whole plan. `video`: frames of the clip that is kept with each
    sample, counted from its own; past e, e is repeated.

    Raises:
        UserError: `tail` leaves no room for a chunk, no span is long enough, or frames are missing.
    """
    if tail < chunk - 1:
        raise UserError(f"data.tail={tail}: a chunk has {chunk} actions; set data.tail={chunk - 1} or more")
    starts = {n: range(s.start, s.end - tail + 1, stride) for n, s in enumerate(data.spans)}
    starts = {number: frames for number, frames in starts.items() if frames}
    if not starts:
        raise UserError(f"{data.folder}: no annotated span is longer than data.tail={tail} frames; lower it")
    needed = {number: range(frames.start, frames[-1] + chunk) for number, frames in starts.items()}
    data.check_frames(np.unique(np.concatenate([np.array(frames) for frames in needed.values()])))
    motions = read_motions(data, needed)
    looks: dict[Look, int] = {}
    texts: dict[str, int] = {}
    index, actions, robot_obs, clips, tasks = [], [], [], [], {}
    for number, frames in starts.items():
        span, (taken, states) = data.spans[number], motions[number]
        text = texts.setdefault(span.instruction, len(texts))
        for frame in frames:
            look = looks.setdefault((frame, text if by_text else -1), len(looks))
            index.append((look, text))
            actions.append(taken[frame - span.start : frame - span.start + chunk])
            robot_obs.append(states[frame - span.start])
            following = [min(frame + offset, span.end) for offset in video or ()]
            clips.append([looks.setdefault((next_frame, -1), len(looks)) for next_frame in following])
        tasks[span.task] = tasks.get(span.task, 0) + len(frames)
    return Plan(
        looks=list(looks),
        index=np.array(index, np.int64),
        actions=np.stack(actions),
        robot_obs=np.stack(robot_obs),
        spans=np.array([(n, frame) for n, frames in starts.items() for frame in frames], np.int64),
        video=None if video is None else np.array(clips, np.int64),
        texts=list(texts),
        tasks=tasks,
    )


Motion = tuple[Float32[np.ndarray, "n 7"], Float32[np.ndarray, "n 15"]]


def read_motions(data: CalvinFolder, spans: dict[int, range]) -> dict[int, Motion]:
    """Relative actions and robot states of each span's frames; every process reads a part and gets all."""
    keys = ("rel_actions", "robot_obs")

    def read(item: tuple[int, range]) -> tuple[int, Motion]:
        frames = [data.frame(frame, keys) for frame in item[1]]
        return item[0], tuple(np.stack([frame[key] for frame in frames]).astype(np.float32) for key in keys)

    state = processes()
    own = list(spans.items())[state.process_index :: state.num_processes]
    with ThreadPoolExecutor(READERS) as pool:
        return dict(sorted(gather_object(list(pool.map(read, own)))))


class CalvinSamples(Dataset):
    """Samples straight from a folder or zip: what a store of kind `images` yields, without one.

    Each sample decompresses its frame; a store reads several times as many per second.
    """

    def __init__(
        self, folder: Path | str, *, image_size: int, chunk: int = 10, tail: int = 21, stride: int = 1
    ) -> None:
        self.data, self.image_size = CalvinFolder(folder), image_size
        self.plan = plan_samples(self.data, chunk=chunk, tail=tail, stride=stride, by_text=False)

    @property
    def fingerprint(self) -> str:
        """Identifies the data, for the checkpoints' manifests."""
        return f"{self.data.fingerprint}-raw-{len(self)}"

    def __len__(self) -> int:
        return len(self.plan.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{images uint8 [V, 3, H, W], text, actions [K, A]}."""
        look, text = self.plan.index[i]
        frame = self.plan.looks[look][0]
        return {
            "images": observe(self.data.frame(frame, CAMERAS), self.image_size),
            "text": self.plan.texts[text],
            "actions": torch.from_numpy(self.plan.actions[i].copy()),
        }


def read_looks(data: CalvinFolder, frames: Sequence[int], size: int) -> torch.Tensor:
    """Both cameras' pictures of some frames, as the policy sees them: uint8 [N, V, 3, size, size]."""
    with ThreadPoolExecutor(READERS) as pool:
        return torch.stack(list(pool.map(lambda frame: observe(data.frame(frame, CAMERAS), size), frames)))
