"""Planning: which samples there are in demonstrations in CALVIN's format."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from accelerate.utils import gather_object
from jaxtyping import Float32, Int64
from omegaconf import DictConfig
from rich.progress import track

from defi.calvin import CalvinFolder, Span, check_gripper
from defi.errors import UserError
from defi.processes import print_once, processes, share
from Step3_DeFI.config import check, check_choice

READERS = 4  # frames that a process reads at the same time
BATCH = 64  # frames that a reader takes at once

Start = tuple[int, Span, int]  # a sample: its annotation's number (-1: none), demonstration, frame


@dataclass(frozen=True)
class SampleRules:
    """Which frames samples start at (configs/data/samples.yaml); `chunk` actions follow from each on."""

    chunk: int
    min_remaining: int
    stride: int
    spans: str

    @classmethod
    def of(cls, section: DictConfig, chunk: int) -> "SampleRules":
        """From the section `data` of a configuration."""
        return cls(chunk, section.min_remaining, section.stride, section.spans)

    def __post_init__(self) -> None:
        check_choice("data.spans", self.spans, ("annotated", "all"))
        check("data.stride", self.stride, self.stride >= 1, "must be 1 or more")
        rest, least = self.min_remaining, self.chunk - 1
        rule = f"a chunk has {self.chunk} actions; set data.min_remaining={least} or more"
        check("data.min_remaining", rest, rest >= least, rule)


@dataclass
class Plan:
    """N samples, and the R distinct observations they need.

    actions: [dx, dy, dz] / 0.02 m, [droll, dpitch, dyaw] / 0.05 rad, gripper +1 open, −1 closed.
    robot_obs: TCP xyz in m, TCP Euler angles in rad, finger width in m, 7 joints in rad, last gripper action.
    """

    observations: Int64[np.ndarray, "R 2"]  # frame, instruction (-1 where the input does not depend on it)
    index: Int64[np.ndarray, "N 2"]  # observation, instruction
    actions: Float32[np.ndarray, "N K A"]
    robot_obs: Float32[np.ndarray, "N 15"]  # at the sample's frame
    spans: Int64[np.ndarray, "N 2"]  # number of the annotated span (-1: none), frame
    video: Int64[np.ndarray, "N F"] | None  # observations at the frames that follow
    texts: list[str]
    tasks: dict[str, int]  # samples of each


def plan_samples(
    data: CalvinFolder, rules: SampleRules, *, by_text: bool = False, clip: range | None = None
) -> Plan:
    """Samples start at s … e − min_remaining of every annotated span (s, e).

    With `spans=all` the recordings' other frames follow, as samples whose instruction is empty; there need be
    no annotation. Processes share the reading; each gets the complete plan.

    Args:
        by_text: whether what is stored of an observation depends on the instruction.
        clip: frames of the video that is kept with each sample, counted from its own; past e, e is repeated.

    Raises:
        UserError: there is no sample, a frame is missing, or holds numbers that no robot has.
    """
    starts = choose_starts(data, rules)
    frames = np.array([frame for _, _, frame in starts])
    chunks = frames[:, None] + np.arange(rules.chunk)
    needed = np.unique(chunks)
    data.check_frames(needed)
    motions = read_motions(data, needed)
    observations: dict[tuple[int, int], int] = {}
    texts: dict[str, int] = {}
    index, clips = [], []

    def observation(frame: int, text: int = -1) -> int:
        return observations.setdefault((frame, text), len(observations))

    for _, span, frame in starts:
        text = texts.setdefault(span.instruction, len(texts))
        index.append((observation(frame, text if by_text else -1), text))
        if clip is not None:
            clips.append([observation(min(frame + offset, span.end)) for offset in clip])
    return Plan(
        observations=np.array(list(observations), np.int64),
        index=np.array(index, np.int64),
        actions=motions[np.searchsorted(needed, chunks), :7],
        robot_obs=motions[np.searchsorted(needed, frames), 7:],
        spans=np.array([(number, frame) for number, _, frame in starts]),
        video=None if clip is None else np.array(clips, np.int64),
        texts=list(texts),
        tasks=dict(Counter(span.task for _, span, _ in starts if span.task)),
    )


def choose_starts(data: CalvinFolder, rules: SampleRules) -> list[Start]:
    """Where samples start. Printed lines tell of spans without words, and of those that are too short.

    Raises:
        UserError: no span, or (`all`) no recording, is long enough.
    """
    rest, everything = rules.min_remaining, rules.spans == "all"
    fate = "taken without text" if everything else "left out"
    spans = [] if everything and not data.is_annotated else data.spans
    if spans:
        print_once(data.missing_text_note(fate=fate))
        if not everything and all(span.fault for span in spans):
            raise UserError(spans[0].fault)
    known = {number: span for number, span in enumerate(spans) if not span.fault}
    starts = [
        (number, span, frame)
        for number, span in known.items()
        for frame in range(span.start, span.end - rest + 1, rules.stride)
    ]
    if short := [span for span in known.values() if span.end - span.start < rest]:
        note = f"{len(short)} of {len(known)} annotated spans are too short for data.min_remaining={rest}"
        note += f": {fate}"
        if lost := sorted({span.task for span in short} - {span.task for _, span, _ in starts}):
            note += f"; tasks without any sample: {', '.join(lost)}"
        if long_enough := sum(span.end - span.start >= rules.chunk - 1 for span in short):
            note += f"; data.min_remaining={rules.chunk - 1} takes {long_enough} of them"
        print_once(f"{data.folder}: {note}")
    if everything:
        taken = [frame for span in known.values() for frame in range(span.start, span.end - rest + 1)]
        annotated = np.array(taken, np.int64)
        for start, end in data.episodes:
            frames = np.setdiff1d(np.arange(start, end - rules.chunk + 2, rules.stride), annotated)
            starts += [(-1, Span(start, end, "", ""), frame) for frame in frames.tolist()]
    if not starts:
        fault = f"no annotated span is longer than data.min_remaining={rest} frames; lower it"
        if everything:
            fault = f"no recording has the {rules.chunk} frames of a chunk; give longer ones"
        raise UserError(f"{data.folder}: {fault}")
    return starts


def read_motions(data: CalvinFolder, frames: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N 22"]:
    """Relative action and robot state of each frame; every process reads a part and gets all.

    Raises:
        UserError: an action or state is no number or absurd; the frame's file is named.
    """

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
