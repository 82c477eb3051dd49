"""The policy's samples, and which of them there are in a robot's data."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch.utils.data import default_collate

from defi.data import Dataset
from defi.data.mixture import Mixture
from defi.data.motions import Motions
from defi.engine.data import readable, sample_seeds
from defi.errors import UserError
from defi.processes import print_once
from defi.robot.spec import Robot
from Step3_DeFI.config import change, check
from Step3_DeFI.observation import observe


@dataclass(kw_only=True)
class SampleSettings:
    """What a section `data` says of samples, beside the settings of the format; see configs/step3_train.yaml.

    min_remaining: frames that follow in the episode where a sample starts; None: as the data set's benchmark
    has it, or those of its actions. stride: frames between the starts. weight: in a mixture.
    """

    min_remaining: int | None = None
    stride: int = 1
    weight: float = 1.0

    def remaining(self, data: Dataset, chunk: int) -> int:
        """Of a data set, for samples of `chunk` actions. UserError if so many frames hold no chunk."""
        check("data.stride", self.stride, self.stride >= 1, "must be 1 or more")
        least = chunk - 1
        rest = max(data.min_remaining, least) if self.min_remaining is None else self.min_remaining
        rule = f"a chunk has {chunk} actions; set data.min_remaining={least} or more"
        check("data.min_remaining", rest, rest >= least, rule)
        return rest


class Pictures:
    """All cameras' pictures of R observations, as the policy sees them: an array that reads when indexed.

    places: number of the episode, and position in it.
    """

    def __init__(self, data: Dataset, places: Int64[np.ndarray, "R 2"], size: int) -> None:
        self.data, self.places, self.size = data, places, size

    def __getitem__(self, rows: int | np.ndarray) -> UInt8[np.ndarray, "*rows V 3 size size"]:
        wanted, cameras = self.places[rows], self.data.cameras
        places, back = np.unique(wanted.reshape(-1, 2), axis=0, return_inverse=True)
        seen = []
        for number in np.unique(places[:, 0]).tolist():
            positions = places[places[:, 0] == number, 1].tolist()
            pictures = self.data.read(self.data.episode(number), positions, cameras)
            for i in range(len(positions)):
                seen.append(observe({name: pictures[name][i] for name in cameras}, cameras, self.size))
        return torch.stack(seen).numpy()[back.reshape(wanted.shape[:-1])]


class PolicySamples:
    """What the policy learns from: N samples of a data set (`RecordedSamples`) or of a `PolicyStore`.

    Samples are {features | latents | images, text, actions [K, A]} and, where wanted, `state` [S] and `video`
    [V, F, ...]. Actions and state are in the robot's units.
    """

    kind: str  # features, latents or images
    draws: int = 1  # versions of the features with different noise, samples of their own
    fingerprint: str  # identifies the data, for the checkpoints' manifests
    normalisation: str  # unless a setting says otherwise
    chunk: int  # K
    inputs: np.ndarray | Pictures  # a row per observation
    index: Int64[np.ndarray, "N 3"]  # row of inputs, number of the instruction, row of motions
    motions: Motions  # of all frames of all episodes
    video: Int64[np.ndarray, "N F"] | None  # rows of inputs, the frames that really follow
    texts: list[str]
    with_state: bool = False

    def robot(self) -> Robot:
        """As the data say; not normalised."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.index) * self.draws

    def sample(self, i: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """Nothing is drawn."""
        number, draw = divmod(i, self.draws)
        row, text, first = self.index[number]
        seen = self.inputs[row][draw] if self.kind == "features" else self.inputs[row]
        actions = self.motions.actions[first : first + self.chunk]
        sample = {
            self.kind: torch.from_numpy(np.array(seen)),
            "text": self.texts[text],
            "actions": torch.from_numpy(np.array(actions)),
        }
        if self.with_state:
            sample["state"] = torch.from_numpy(np.array(self.motions.state[first]))
        if self.video is not None:
            sample["video"] = torch.from_numpy(self.inputs[self.video[number]]).transpose(0, 1)
        return sample

    __getitem__ = sample


def spread(samples: PolicySamples | Mixture[PolicySamples], count: int, seed: int = 0) -> dict[str, Any]:
    """A batch of samples from all over the data; those that cannot be read are left out."""
    picked = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    read = [sample for _, sample in readable(samples.sample, picked.tolist())]
    return default_collate(read) | {"seed": sample_seeds("shown", seed, len(read))}


class RecordedSamples(PolicySamples):
    """Samples straight from a data set, of which a store is made. Samples of a store read much faster.

    They start at every `stride`-th frame of an episode that `min_remaining` frames follow. Episodes without
    words need the frames of a chunk alone, and begin no sample at a frame where one with words can begin one.

    Args:
        by_text: whether what is stored of an observation depends on the instruction.
        clip: frames of the video that is kept with each sample, counted from its own; past the episode's end
            its last is repeated.

    Raises:
        UserError: there is no sample, a frame is missing, or holds numbers that no robot has.
    """

    kind = "images"
    starts: Int64[np.ndarray, "N 2"]  # of each sample: number of the episode, position in it
    observations: Int64[np.ndarray, "R 3"]  # distinct ones: episode, position, instruction (−1: not by_text)
    tasks: dict[str, int]  # samples of each

    def __init__(
        self,
        data: Dataset,
        settings: SampleSettings,
        *,
        chunk: int,
        image_size: int,
        by_text: bool = False,
        clip: range | None = None,
    ) -> None:
        self.data, self.normalisation, self.chunk = data, data.normalisation, chunk
        self.starts = choose_starts(data, settings.remaining(data, chunk), settings.stride, chunk)
        data.check_files()
        self.motions = data.motions
        number, position = self.starts.T
        frames = data.starts[number] + position
        text, self.texts = self._texts()
        wanted = frames[:, None]
        if clip is not None:
            last = (data.starts + data.lengths - 1)[number]
            wanted = np.concatenate([wanted, np.minimum(frames[:, None] + list(clip), last[:, None])], axis=1)
        said = np.where(by_text, text, -1)
        keys = wanted * (len(self.texts) + 1) + said[:, None] + 1
        _, first, rows = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")  # rows as samples come to need them
        rows = np.argsort(order)[rows.reshape(wanted.shape)]
        sample = first[order] // wanted.shape[1]  # the first that needs it
        position = wanted.ravel()[first[order]] - data.starts[number[sample]]
        self.observations = np.stack([number[sample], position, said[sample]], axis=1)
        self.inputs = Pictures(data, self.observations[:, :2], image_size)
        self.index = np.stack([rows[:, 0], text, self.motions.rows(frames)], axis=1)
        self.video = None if clip is None else rows[:, 1:]
        self.fingerprint = f"{data.fingerprint}-images-{len(self)}"  # as of the store

    def robot(self) -> Robot:
        return self.data.robot()

    def _texts(self) -> tuple[Int64[np.ndarray, " N"], list[str]]:
        """The instruction's number of each sample, and the instructions; counts the samples of tasks."""
        numbers: dict[str, int] = {}
        found, tasks = [], Counter[str]()
        episode, current = None, -1
        for number, position in self.starts.tolist():
            if number != current:
                episode, current = self.data.episode(number), number
            found.append(numbers.setdefault(episode.text(position), len(numbers)))
            tasks[episode.task] += 1
        tasks.pop("", None)
        self.tasks = dict(tasks)
        if wordless := found.count(numbers.get("", -1)):
            print_once(f"{self.data.root}: {wordless} of {len(found)} samples have no instruction")
        return np.array(found, np.int64), list(numbers)


def choose_starts(data: Dataset, rest: int, stride: int, chunk: int) -> Int64[np.ndarray, "N 2"]:
    """Episode and position of each sample. A note is printed on episodes that are too short."""
    found: list[tuple[int, np.ndarray]] = []
    short: list[tuple[str, bool]] = []  # task, whether a chunk fits
    wordless, taken, words = [], [np.empty(0, np.int64)], 0
    for number in range(len(data)):
        episode = data.episode(number)
        if episode.texts == ("",):
            wordless.append((number, episode))
            continue
        words += 1
        if episode.length <= rest:
            short.append((episode.task, episode.length >= chunk))
            continue
        found.append((number, np.arange(0, episode.length - rest, stride)))
        taken.append(np.arange(episode.start, episode.start + episode.length - rest))
    if short:
        left = {task for task, _ in short} - {data.episode(number).task for number, _ in found} - {""}
        note = f"{len(short)} of {words} episodes are too short for data.min_remaining={rest}: left out"
        note += f"; tasks without any sample: {', '.join(sorted(left))}" if left else ""
        if long_enough := sum(fits for _, fits in short):
            note += f"; data.min_remaining={chunk - 1} takes {long_enough} of them"
        print_once(f"{data.root}: {note}")
    begun = np.unique(np.concatenate(taken))
    for number, episode in wordless:
        positions = np.arange(0, episode.length - chunk + 1, stride)
        found.append((number, positions[~np.isin(episode.start + positions, begun)]))
    starts = [np.stack([np.full_like(positions, number), positions], axis=1) for number, positions in found]
    if not sum(map(len, starts)):
        fault = f"no episode is longer than data.min_remaining={rest} frames; lower it"
        if wordless:
            fault = f"no episode has the {chunk} frames of a chunk; give longer ones"
        raise UserError(f"{data.root}: {fault}")
    return np.concatenate(starts)


def as_read(robot: Robot, state: bool) -> Robot:
    """A robot without its state, unless a policy reads it."""
    return robot if state else replace(robot, state=None)


def fit_robot(
    sets: Mapping[str, PolicySamples | Dataset],
    normalisation: str | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    state: bool = True,
) -> Robot:
    """The robot that a policy learns from some data sets, by name, normalised by all of their frames.

    normalisation: none, mean_std or bounds; None: as the data sets have it. changes: by settings.

    Raises:
        UserError: they are of different robots; what differs is named.
    """
    (first, one), *others = sets.items()
    robot, kinds = as_read(one.robot(), state), {each.normalisation for each in sets.values()}
    for name, other in others:
        check_same_robot(robot, as_read(other.robot(), state), f"data.sets.{name}", f"data.sets.{first}")
    if normalisation is None and len(kinds) > 1:
        raise UserError("policy.normalisation=null: the data sets differ; give none, mean_std or bounds")
    motions = [each.motions for each in sets.values()]
    joined = motions[0]
    if others:
        width = len(robot.state or ())
        parts = [(each.frames, each.actions, each.state[:, :width]) for each in motions]
        joined = Motions(*map(np.concatenate, zip(*parts)))
    return change(robot, changes).fitted(joined, normalisation or kinds.pop())


def check_same_robot(robot: Robot, other: Robot, name: str, first: str) -> None:
    """Raises UserError, with all that differs, if the data `name` are not of the robot of `first`."""
    differ = other.differences(robot)
    if bool(robot.state) != bool(other.state):
        differ.append("a state" if other.state else "no state")
    if differ:
        fix = "name what both have (data.cameras, data.actions, data.fps …), or train on one of them"
        raise UserError(f"{name}: not the robot of {first}: {'; '.join(differ)}; {fix}")
