"""The policy's samples, and which of them there are in demonstrations in CALVIN's format."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float32, Int64, UInt8
from rich.progress import track
from torch.utils.data import Dataset, default_collate

from defi.data.calvin import CAMERAS, CalvinFolder, Span, check_gripper
from defi.engine.data import readable, sample_seeds
from defi.errors import UserError
from defi.processes import print_once, processes, share
from Step3_DeFI.config import check, check_choice
from Step3_DeFI.observation import observe

READERS = 4  # frames that a process reads at the same time
BATCH = 64  # frames that a reader takes at once


@dataclass(frozen=True)
class SampleRules:
    """Which frames samples start at (configs/data/samples.yaml); `chunk` actions follow from each on."""

    chunk: int
    min_remaining: int
    stride: int
    spans: str

    def __post_init__(self) -> None:
        rest, least = self.min_remaining, self.chunk - 1
        check_choice("data.spans", self.spans, ("annotated", "all"))
        check("data.stride", self.stride, self.stride >= 1, "must be 1 or more")
        rule = f"a chunk has {self.chunk} actions; set data.min_remaining={least} or more"
        check("data.min_remaining", rest, rest >= least, rule)


class Pictures:
    """Both cameras' pictures of R observations, as the policy sees them: an array that reads when indexed."""

    def __init__(self, data: CalvinFolder, frames: Int64[np.ndarray, " R"], size: int) -> None:
        self.data, self.frames, self.size = data, frames, size

    def __getitem__(self, rows: int | np.ndarray) -> UInt8[np.ndarray, "*rows V 3 size size"]:
        wanted = self.frames[rows]
        frames, places = np.unique(wanted, return_inverse=True)
        with ThreadPoolExecutor(READERS) as pool:
            keys = tuple(CAMERAS.values())
            seen = list(
                pool.map(lambda frame: observe(self.data.frame(frame, keys), keys, self.size), frames)
            )
        return torch.stack(seen).numpy()[places.reshape(wanted.shape)]


class PolicySamples(Dataset):
    """What the policy learns from: N samples of recordings (`CalvinSamples`) or of a `PolicyStore`.

    Samples are {features | latents | images, text, actions [K, A]} and, where kept, `video` [V, F, ...].
    Actions are [dx, dy, dz] / 0.02 m, [droll, dpitch, dyaw] / 0.05 rad, gripper +1 open, −1 closed.
    """

    kind: str  # features, latents or images
    draws: int = 1  # versions of the features with different noise, samples of their own
    fingerprint: str  # identifies the data, for the checkpoints' manifests
    inputs: np.ndarray | Pictures  # a row per observation
    index: Int64[np.ndarray, "N 2"]  # row of inputs, number of the instruction
    actions: Float32[np.ndarray, "N K A"]
    video: Int64[np.ndarray, "N F"] | None  # rows of inputs, the frames that really follow
    texts: list[str]

    def __len__(self) -> int:
        return len(self.index) * self.draws

    def __getitem__(self, i: int) -> dict[str, Any]:
        number, draw = divmod(i, self.draws)
        row, text = self.index[number]
        seen = self.inputs[row][draw] if self.kind == "features" else self.inputs[row]
        sample = {
            self.kind: torch.from_numpy(np.array(seen)),
            "text": self.texts[text],
            "actions": torch.from_numpy(np.array(self.actions[number])),
        }
        if self.video is not None:
            sample["video"] = torch.from_numpy(self.inputs[self.video[number]]).transpose(0, 1)
        return sample

    def spread(self, count: int, seed: int = 0) -> dict[str, Any]:
        """A batch of samples from all over the data; those that cannot be read are left out."""
        picked = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        read = [sample for _, sample in readable(self.__getitem__, picked.tolist())]
        return default_collate(read) | {"seed": sample_seeds("shown", seed, len(read))}


class CalvinSamples(PolicySamples):
    """Samples straight from a folder or zip, of which a store is made. Samples of a store read much faster.

    They start at s … e − min_remaining of every annotated span (s, e). With `spans=all` the recordings' other
    frames follow, with an empty instruction; there need be no annotation. Processes share the reading of
    actions.

    Args:
        by_text: whether what is stored of an observation depends on the instruction.
        clip: frames of the video that is kept with each sample, counted from its own; past e, e is repeated.

    Raises:
        UserError: there is no sample, a frame is missing, or holds numbers that no robot has.
    """

    kind = "images"
    observations: Int64[np.ndarray, "R 2"]  # the distinct ones: frame, instruction (−1 without `by_text`)
    # TCP xyz in m, TCP Euler angles in rad, finger width in m, 7 joints in rad, last gripper action
    robot_obs: Float32[np.ndarray, "N 15"]
    spans: Int64[np.ndarray, "N 2"]  # number of the annotated span (−1: none), frame
    tasks: dict[str, int]  # samples of each

    def __init__(
        self,
        folder: Path | str,
        rules: SampleRules,
        *,
        image_size: int,
        by_text: bool = False,
        clip: range | None = None,
    ) -> None:
        self.data = CalvinFolder(folder)
        starts = choose_starts(self.data, rules)
        frames = np.array([frame for _, _, frame in starts])
        chunks = frames[:, None] + np.arange(rules.chunk)
        needed = np.unique(chunks)
        self.data.check_frames(needed)
        motions = read_motions(self.data, needed)
        observations: dict[tuple[int, int], int] = {}
        texts: dict[str, int] = {}
        index, videos = [], []

        def observation(frame: int, text: int = -1) -> int:
            return observations.setdefault((frame, text), len(observations))

        for _, span, frame in starts:
            text = texts.setdefault(span.instruction, len(texts))
            index.append((observation(frame, text if by_text else -1), text))
            videos.append([observation(min(frame + offset, span.end)) for offset in clip or ()])
        self.observations = np.array(list(observations), np.int64)
        self.inputs = Pictures(self.data, self.observations[:, 0], image_size)
        self.index = np.array(index, np.int64)
        self.actions = motions[np.searchsorted(needed, chunks), :7]
        self.robot_obs = motions[np.searchsorted(needed, frames), 7:]
        self.spans = np.array([(number, frame) for number, _, frame in starts])
        self.video = None if clip is None else np.array(videos, np.int64)
        self.texts = list(texts)
        self.tasks = dict(Counter(span.task for _, span, _ in starts if span.task))
        self.fingerprint = f"{self.data.fingerprint}-images-{len(self)}"  # as of the store


def choose_starts(data: CalvinFolder, rules: SampleRules) -> list[tuple[int, Span, int]]:
    """Number of the annotated span (−1: none), demonstration and frame of each sample.

    Notes are printed on spans without words, and on those that are too short.
    """
    rest, everything = rules.min_remaining, rules.spans == "all"
    fate = "taken without text" if everything else "left out"
    spans = data.spans if data.is_annotated or not everything else []
    if spans:
        print_once(data.missing_text_note(fate=fate))
        if not everything and all(span.fault for span in spans):
            raise UserError(spans[0].fault)
    known = [(number, span) for number, span in enumerate(spans) if not span.fault]
    starts = [
        (number, span, frame)
        for number, span in known
        for frame in range(span.start, span.end - rest + 1, rules.stride)
    ]
    if short := [span for _, span in known if span.end - span.start < rest]:
        count = f"{len(short)} of {len(known)} annotated spans"
        note = f"{count} are too short for data.min_remaining={rest}: {fate}"
        if lost := sorted({span.task for span in short} - {span.task for _, span, _ in starts}):
            note += f"; tasks without any sample: {', '.join(lost)}"
        if long_enough := sum(span.end - span.start >= rules.chunk - 1 for span in short):
            note += f"; data.min_remaining={rules.chunk - 1} takes {long_enough} of them"
        print_once(f"{data.folder}: {note}")
    if everything:
        frames_of = [np.arange(span.start, span.end - rest + 1) for _, span in known]
        taken = np.unique(np.concatenate([np.empty(0, np.int64), *frames_of]))
        for start, end in data.episodes:
            frames = np.setdiff1d(np.arange(start, end - rules.chunk + 2, rules.stride), taken)
            starts += [(-1, Span(start, end, "", ""), int(frame)) for frame in frames]
    if not starts:
        fault = f"no annotated span is longer than data.min_remaining={rest} frames; lower it"
        if everything:
            fault = f"no recording has the {rules.chunk} frames of a chunk; give longer ones"
        raise UserError(f"{data.folder}: {fault}")
    return starts


def read_motions(data: CalvinFolder, frames: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N 22"]:
    """Relative action and robot state of each frame; every process reads a part and gets all."""

    def read(batch: tuple[int, np.ndarray]) -> tuple[int, np.ndarray]:
        motions = []
        for number in batch[1].tolist():
            frame = data.frame(number, ("rel_actions", "robot_obs"))
            check_gripper(data.path(number), frame["rel_actions"])
            motions.append(np.concatenate([frame["rel_actions"], frame["robot_obs"]]).astype(np.float32))
        return batch[0], np.stack(motions)

    own = share(list(enumerate(np.array_split(frames, -(-len(frames) // BATCH)))))
    quiet = not processes().is_local_main_process
    with ThreadPoolExecutor(READERS) as pool:  # of CALVIN a million small files: minutes
        found = track(pool.map(read, own), "actions", total=len(own), transient=True, disable=quiet)
        return np.concatenate([motions for _, motions in sorted(gather_object(list(found)))])
