"""Planning: which samples there are in demonstrations in CALVIN's format."""

from collections.abc import Sequence
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

READERS = 4  # frames that a process reads at the same time
BATCH = 64  # frames that a process takes at once


@dataclass(frozen=True)
class SampleRules:
    """Which frames samples start at: configs/data/samples.yaml; `chunk` actions follow from each on."""

    chunk: int
    min_remaining: int
    stride: int
    spans: str

    def __post_init__(self) -> None:
        if self.spans not in ("annotated", "all"):
            raise UserError(f"data.spans={self.spans}: choose annotated or all")
        if self.stride < 1:
            raise UserError(f"data.stride={self.stride}: must be 1 or more")
        if self.min_remaining < (least := self.chunk - 1):
            raise UserError(
                f"data.min_remaining={self.min_remaining}: a chunk has {self.chunk} actions; "
                f"set data.min_remaining={least} or more"
            )

    @classmethod
    def of(cls, section: DictConfig, chunk: int) -> "SampleRules":
        """From the section `data` of a configuration."""
        return cls(chunk, section.min_remaining, section.stride, section.spans)


@dataclass(frozen=True)
class Starts:
    """Frames of one demonstration at which samples start, in order; `number` is its annotation's, or -1."""

    number: int
    span: Span
    frames: Sequence[int]


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
    frames = np.array([frame for each in starts for frame in each.frames])
    chunks = frames[:, None] + np.arange(rules.chunk)
    needed = np.unique(chunks)
    data.check_frames(needed)
    motions = read_motions(data, needed)
    observations: dict[tuple[int, int], int] = {}
    texts: dict[str, int] = {}
    index, clips, tasks = [], [], {}

    def observation(frame: int, text: int = -1) -> int:
        return observations.setdefault((frame, text), len(observations))

    for each in starts:
        text = texts.setdefault(each.span.instruction, len(texts))
        for frame in each.frames:
            index.append((observation(frame, text if by_text else -1), text))
            clips.append([observation(min(frame + offset, each.span.end)) for offset in clip or ()])
        if each.span.task:
            tasks[each.span.task] = tasks.get(each.span.task, 0) + len(each.frames)
    numbers = np.repeat([each.number for each in starts], [len(each.frames) for each in starts])
    return Plan(
        observations=np.array(list(observations), np.int64),
        index=np.array(index, np.int64),
        actions=motions[np.searchsorted(needed, chunks), :7],
        robot_obs=motions[np.searchsorted(needed, frames), 7:],
        spans=np.stack([numbers, frames], 1),
        video=None if clip is None else np.array(clips, np.int64),
        texts=list(texts),
        tasks=tasks,
    )


def choose_starts(data: CalvinFolder, rules: SampleRules) -> list[Starts]:
    """Where samples start. Printed lines tell of spans without words, and of those that are too short.

    Raises:
        UserError: no span, or (`all`) no recording, is long enough.
    """
    all_frames = rules.spans == "all"
    fate = "taken without text" if all_frames else "left out"
    spans = [] if all_frames and not data.is_annotated else data.spans
    known = {number: span for number, span in enumerate(spans) if not span.fault}
    if spans:
        print_once(data.without_words(fate=fate))
        if not known and not all_frames:
            raise UserError(spans[0].fault)
    starts = [
        Starts(number, span, range(span.start, span.end - rules.min_remaining + 1, rules.stride))
        for number, span in known.items()
    ]
    print_once(short_note(data, starts, rules, fate))
    if all_frames:
        starts += unannotated_starts(data, list(known.values()), rules)
    if starts := [each for each in starts if each.frames]:
        return starts
    if all_frames:
        fault = f"no recording has the {rules.chunk} frames of a chunk; give longer ones"
    else:
        fault = f"no annotated span is longer than data.min_remaining={rules.min_remaining} frames; lower it"
    raise UserError(f"{data.folder}: {fault}")


def short_note(data: CalvinFolder, annotated: Sequence[Starts], rules: SampleRules, fate: str) -> str:
    """A line about annotated spans in which no sample starts, and their `fate`; "" if there are none."""
    short = [each.span for each in annotated if not each.frames]
    if not short:
        return ""
    note = f"{len(short)} of {len(annotated)} annotated spans are too short for "
    note += f"data.min_remaining={rules.min_remaining}: {fate}"
    kept_tasks = {each.span.task for each in annotated if each.frames}
    if lost := sorted({span.task for span in short} - kept_tasks):
        note += f"; tasks without any sample: {', '.join(lost)}"
    if long_enough := sum(span.end - span.start >= rules.chunk - 1 for span in short):
        note += f"; data.min_remaining={rules.chunk - 1} takes {long_enough} of them"
    return f"{data.folder}: {note}"


def unannotated_starts(data: CalvinFolder, spans: Sequence[Span], rules: SampleRules) -> list[Starts]:
    """The frames of every recording that lie in no span's s … e − min_remaining; without instruction."""
    annotated = [frame for span in spans for frame in range(span.start, span.end - rules.min_remaining + 1)]
    return [
        Starts(-1, Span(start, end, "", ""), np.setdiff1d(frames, annotated).tolist())
        for start, end in data.episodes
        for frames in [np.arange(start, end - rules.chunk + 2, rules.stride)]
    ]


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
