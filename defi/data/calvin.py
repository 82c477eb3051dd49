"""CALVIN's data format: one compressed `.npz` per frame, index files beside them. Reader and writer.

A data set is a folder with the splits `training` and `validation`; a split holds

    episode_0000123.npz              one frame: pictures, actions, robot and scene state (`FRAME`)
    ep_start_end_ids.npy             int64 [N, 2]: first and last frame of each recording, both included
    ep_lens.npy                      int64 [N]
    scene_info.npy                   {"calvin_scene_A": [first frame, last frame], ...}
    lang_annotations/auto_lang_ann.npy   {"language": {"ann", "task", "emb"}, "info": {"indx", "episodes"}}
    .hydra/merged_config.yaml        the simulator's settings

The folder may lie within a zip (`task_ABC_D.zip/training`), which is read without unpacking it.

Reading never runs code from a file: the pickled dicts go through `defi.npy`.
"""

import contextlib
import hashlib
import io
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32, Float64, Int64

from defi.archive import COPY_AGAIN, open_files
from defi.data.episode import Dataset, DataSettings, Episode, Frames, Part, share_of
from defi.errors import UserError, reading
from defi.instructions import read_instruction
from defi.npy import load_npy, plain_array
from defi.picture import stack_frames
from defi.processes import print_once
from defi.robot.spec import Gripper, Robot, Vector

TRAINING, VALIDATION = "training", "validation"
INDEX, LENGTHS, SCENES = "ep_start_end_ids.npy", "ep_lens.npy", "scene_info.npy"
ANNOTATIONS = "lang_annotations/auto_lang_ann.npy"
FRAME_FILE = re.compile(r"episode_(\d{7})\.npz")
LARGEST_MEMBER = 64 * 2**20  # bytes of one array of a frame; a camera of 4000² pixels has 48 MB
READERS = 4  # frames that are read at the same time
EMBEDDING = (1, 384)  # CALVIN's sentence embedding of one annotation

# Key -> (type, shape). Cameras keep their own sizes (CALVIN: static 200x200, gripper 84x84); depth is unused.
FRAME: dict[str, tuple[type, tuple[int | None, ...]]] = {
    "rgb_static": (np.uint8, (None, None, 3)),
    "rgb_gripper": (np.uint8, (None, None, 3)),
    "rel_actions": (np.float64, (7,)),  # dxyz / 0.02 m, drpy / 0.05 rad, gripper +1 open, -1 closed
    "actions": (np.float64, (7,)),  # target: TCP xyz in m, TCP Euler angles in rad, gripper
    "robot_obs": (np.float64, (15,)),
    "scene_obs": (np.float64, (24,)),
}
# Key -> (largest absolute value, unit). CALVIN clips relative actions to [-1, 1]; 1 % allows for rounding.
STATE = (100.0, "metres and radians")
RELATIVE = (1.01, "shares of 0.02 m and 0.05 rad, clipped to [-1, 1], and the gripper's 1 or -1")
LIMITS = {"actions": STATE, "robot_obs": STATE, "scene_obs": STATE, "rel_actions": RELATIVE}


@dataclass(frozen=True)
class Span:
    """A demonstration: frames `start` to `end` (both included), its instruction, the task's name.

    fault: why there is no instruction ("" if there is one).
    """

    start: int
    end: int
    instruction: str
    task: str
    fault: str = ""


def frame_name(frame: int) -> str:
    return f"episode_{frame:07d}.npz"


def read_frame(
    path: Path, keys: Iterable[str] = tuple(FRAME), *, file: Path | BinaryIO | None = None
) -> dict[str, np.ndarray]:
    """The arrays `keys` of one frame's file; its other members are not decompressed.

    file: what to read instead where the bytes do not lie at `path`, but in a zip, say.
    """
    arrays = {}
    with reading(path, "copy or collect it again"), zipfile.ZipFile(file or path) as archive:
        for key in keys:
            member = archive.getinfo(f"{key}.npy")
            if member.file_size > LARGEST_MEMBER:  # zeros take a thousandth of their size
                raise ValueError(f"{key}.npy has {member.file_size:,} bytes")
            arrays[key] = plain_array(archive.read(member))
    for key, array in arrays.items():
        dtype, shape = FRAME.get(key, (array.dtype, array.shape))
        kind_fits = array.dtype == np.uint8 if dtype is np.uint8 else array.dtype.kind == np.dtype(dtype).kind
        if not (kind_fits and _fits(array.shape, shape)):
            expected = f"expected {np.dtype(dtype)} {shape}; give frames in CALVIN's format"
            raise UserError(f"{path}: {key} is {array.dtype} {array.shape}, {expected}")
        limit, unit = LIMITS.get(key, (np.inf, ""))
        if unit and (wrong := ~(np.abs(array) <= limit)).any():
            raise UserError(
                f"{path}: {key} holds {array[wrong][0]:g} at place {wrong.argmax()}, expected are numbers of "
                f"at most {limit:g} ({unit}); correct the frame, or leave its recording out"
            )
    return arrays


def check_gripper(path: Path, action: Float64[np.ndarray, "7"]) -> None:
    """Raises UserError if an action neither opens nor closes the gripper: CALVIN's robot takes no other."""
    if abs(abs(action[6]) - 1) > RELATIVE[0] - 1:
        value = f"rel_actions holds the gripper's action {action[6]:g}"
        raise UserError(f"{path}: {value}, expected is 1 (open) or -1 (closed); write one of them")


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e in (None, n) for n, e in zip(shape, expected))


def _items(value: Any) -> list[Any]:
    """A list or array as a list; a single text may stand there as it is."""
    return list(value if isinstance(value, (list, tuple)) else np.atleast_1d(np.array(value, object)))


class CalvinFolder:
    """One split of a data set in CALVIN's format, a folder or one within a zip, read lazily.

    Raises:
        UserError: the folder is missing, has no frames, its index is not one or contradicts itself.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = open_files(self.folder)
        index = self._files.path(INDEX)
        if INDEX not in self._files:
            raise UserError(f"{index}: missing, so this is no split of a CALVIN data set; check the path")
        ids = np.asarray(self._load(INDEX))
        ids = ids[None] if ids.shape == (2,) else ids  # of a single recording
        with reading(index, COPY_AGAIN):
            if ids.shape[1:] != (2,) or ids.dtype.kind not in "iu":
                raise ValueError(f"not an integer array of shape [N, 2] but {ids.dtype} {ids.shape}")
            if len(ids) == 0:
                raise ValueError("no frames in this split")
            if (ids[:, 0] < 0).any() or (ids[:, 1] < ids[:, 0]).any():
                raise ValueError("a recording ends before it starts")
        self.episodes: list[tuple[int, int]] = list(map(tuple, ids.tolist()))
        lengths = ids[:, 1] - ids[:, 0] + 1
        if LENGTHS in self._files and not np.array_equal(np.ravel(self._load(LENGTHS)), lengths):
            raise UserError(f"{self._files.path(LENGTHS)}: contradicts {INDEX}; {COPY_AGAIN}")
        self.is_annotated = ANNOTATIONS in self._files  # whether it says what its demonstrations show

    def _load(self, name: str) -> Any:
        return load_npy(self._files.path(name), self._files.read(name))

    @cached_property
    def frame_ids(self) -> Int64[np.ndarray, " frames"]:
        """Numbers of all frames, in the order of the recordings."""
        return np.concatenate([np.arange(start, end + 1) for start, end in self.episodes])

    @cached_property
    def spans(self) -> list[Span]:
        """The annotated demonstrations, in the file's order, with and without instruction."""
        path = self._files.path(ANNOTATIONS)
        if not self.is_annotated:
            without = "data.spans=recordings, or all"
            raise UserError(f"{path}: missing annotation of instructions; copy it, or do without ({without})")
        annotation = self._load(ANNOTATIONS)
        with reading(path, "not CALVIN's annotation (language.ann, language.task, info.indx)"):
            texts, tasks = (_items(annotation["language"][key]) for key in ("ann", "task"))
            bounds = np.array(annotation["info"]["indx"], np.int64).reshape(-1, 2).tolist()
            if not len(bounds) == len(texts) == len(tasks):
                raise ValueError(f"{len(bounds)} spans, {len(texts)} texts, {len(tasks)} tasks")
        spans = []
        for number, ((first, last), text, task) in enumerate(zip(bounds, texts, tasks)):
            if not any(start <= first <= last <= end for start, end in self.episodes):
                outside = f"span ({first}, {last}) lies outside the recordings of {INDEX}"
                raise UserError(f"{path}: {outside}; give both files of the same data set")
            where = f"{path}: the text of span {number} (frames {first} to {last})"
            instruction = fault = name = ""
            try:
                instruction = read_instruction(text, where)
                fault = "" if instruction else f"{where} is blank"
            except UserError as error:
                fault = str(error)
            with contextlib.suppress(UserError):  # the task only names the span in counts
                name = read_instruction(task, where)
            spans.append(Span(first, last, instruction, name, fault))
        return spans

    def missing_text_note(self, *, fate: str) -> str:
        """A note on annotated spans without instruction and their `fate`; "" if there are none."""
        faults = [span.fault for span in self.spans if span.fault]
        count = f"{len(faults)} of {len(self.spans)} annotated spans have no instruction"
        return f"{self.folder}: {count}: {fate}; the first: {faults[0]}" if faults else ""

    @cached_property
    def scenes(self) -> dict[str, tuple[int, int]]:
        """Scene name ("A") -> its first and last frame; empty where the data set does not say."""
        if SCENES not in self._files:
            return {}
        info = self._load(SCENES)
        with reading(self._files.path(SCENES), "not a dict of scene -> [first frame, last frame]"):
            return {str(k).rpartition("_")[2]: (int(first), int(last)) for k, (first, last) in info.items()}

    def path(self, frame: int) -> Path:
        return self._files.path(frame_name(frame))

    def frame(self, frame: int, keys: Iterable[str] = tuple(FRAME)) -> dict[str, np.ndarray]:
        """Arrays of one frame, as stored (pictures uint8 [H, W, 3], states float64)."""
        return read_frame(self.path(frame), keys, file=self._files.open(frame_name(frame)))

    def stack(self, key: str, frames: Iterable[int]) -> np.ndarray:
        """One array of several frames, e.g. `stack("rel_actions", range(start, end + 1))` -> [frames, 7]."""
        frames = list(frames)
        return stack_frames([self.frame(i, (key,))[key] for i in frames], [self.path(i) for i in frames])

    def check_frames(self, frames: Int64[np.ndarray, " N"]) -> None:
        """Raises UserError if the files of some frames are missing; none is opened."""
        found = [int(match[1]) for name in self._files if (match := FRAME_FILE.fullmatch(name))]
        missing = np.setdiff1d(frames, np.array(found, np.int64))
        if len(missing):
            more = f"{len(missing) - 1:,} more of the {len(frames):,} frames that are needed"
            raise UserError(f"{self.path(int(missing[0]))}: missing, and {more}; {COPY_AGAIN}")

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the data: hash of the index files and of 16 frames spread over the split."""
        digest = hashlib.sha256()
        for name in (INDEX, ANNOTATIONS):
            if name in self._files:
                digest.update(self._files.read(name))
        for i in np.linspace(0, len(self.frame_ids) - 1, 16).astype(int):
            frame = self.frame(int(self.frame_ids[i]), ("rgb_static", "rel_actions"))
            digest.update(frame["rgb_static"].tobytes() + frame["rel_actions"].tobytes())
        return digest.hexdigest()[:16]


def encode_frame(frame: Mapping[str, np.ndarray]) -> bytes:
    """The `.npz` file of one frame: pictures deflated at zlib's fastest level, the small arrays as they are.

    Measured with pictures of 128² and 84² pixels: 0.5 ms and 14 KB. The file's dates are fixed, so that the
    same frame gives the same bytes.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, (dtype, shape) in FRAME.items():
            array = np.ascontiguousarray(frame[key], dtype)
            assert _fits(array.shape, shape), (key, array.shape)
            method = zipfile.ZIP_DEFLATED if array.ndim == 3 else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(f"{key}.npy"), _npy(array), method, compresslevel=1)
    return buffer.getvalue()


def _npy(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)  # CALVIN's own readers expect pickled dicts
    return buffer.getvalue()


def index_files(
    episodes: Sequence[tuple[int, int]], spans: Sequence[Span], scenes: Mapping[str, tuple[int, int]]
) -> dict[str, bytes]:
    """Relative path -> contents of a split's index files.

    The sentence embeddings, which this project does not use, are zeros of CALVIN's shape.
    """
    ids = np.array(episodes, np.int64).reshape(-1, 2)
    annotation = {
        "language": {
            "ann": [span.instruction for span in spans],
            "task": [span.task for span in spans],
            "emb": np.zeros((len(spans), *EMBEDDING), np.float32),
        },
        "info": {"episodes": [], "indx": [(span.start, span.end) for span in spans]},
    }
    return {
        INDEX: _npy(ids),
        LENGTHS: _npy(ids[:, 1] - ids[:, 0] + 1),
        SCENES: _npy({f"calvin_scene_{name}": list(ends) for name, ends in scenes.items()}),
        ANNOTATIONS: _npy(annotation),
    }


# ---------------------------------------------------------------- as data of every stage

CAMERAS = {"static": "rgb_static", "gripper": "rgb_gripper"}
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "width")
STATE_NAMES = (*POSE, *(f"joint_{i}" for i in range(1, 8)), "last_gripper")


def calvin_robot(cameras: Sequence[str] = tuple(CAMERAS)) -> Robot:
    """The published policy's robot: actions as they are stored, the gripper binarised at 0."""
    actions, state = Vector.plain(ACTION_NAMES), Vector.plain(STATE_NAMES)
    actions.units = ["0.02 m"] * 3 + ["0.05 rad"] * 3 + ["1 open, -1 closed"]
    actions.relative = [True] * 6 + [False]
    state.units = ["m"] * 3 + ["rad"] * 3 + ["m"] + ["rad"] * 7 + actions.units[-1:]
    return Robot(list(cameras), actions, state, fps=30.0, gripper=Gripper(dimension=6))


@dataclass(kw_only=True)
class Settings(DataSettings):
    """`split` (None: training) and `held_out` (validation) are folders of `root`, or CALVIN's zip itself.

    spans: annotated (those with an instruction); recordings (all of them, without words); all (both);
    None: annotated, and recordings where no words are needed (labels, the autoencoder).
    share: of each task's annotated spans of training; a smaller one lies within a larger one.
    """

    spans: str | None = None
    share: float = 1.0

    def open(self, part: Part) -> "CalvinData":
        split = self.held_out or VALIDATION if part == "held_out" else self.split or TRAINING
        spans = self.spans or "annotated"
        if spans not in ("annotated", "recordings", "all"):
            raise UserError(f"data.spans={spans}: choose annotated, recordings or all")
        if not 0 < self.share <= 1 or (self.share < 1 and spans != "annotated"):
            raise UserError(f"data.share={self.share}: a number in (0, 1], and 1 but with spans=annotated")
        share = self.share if part == "training" else 1
        return CalvinData(Path(self.root, split), self.places(), spans, share)

    def holds_out(self) -> bool:
        root = Path(self.root)
        return self.held_out is not None or not root.is_dir() or (root / VALIDATION).is_dir()

    def wordless(self) -> "Settings":
        return replace(self, spans=self.spans or ("recordings" if self.share == 1 else "annotated"))


class CalvinData(Dataset):
    """An episode per annotated span, per recording, or both, in this order."""

    fps, normalisation, min_remaining = 30.0, "none", 21  # published: all three
    known_by_names = False
    action_names, state_names = ACTION_NAMES, STATE_NAMES

    def __init__(self, folder: Path, places: Mapping[str, str], spans: str, share: float) -> None:
        self.files = CalvinFolder(folder)
        self.root, self.fingerprint = folder, self.files.fingerprint + (f"-{share:g}" if share < 1 else "")
        known = set(CAMERAS) | set(CAMERAS.values())
        if unknown := set(places.values()) - known:
            raise UserError(f"data.cameras: {min(unknown)!r} is no camera; choose from {', '.join(CAMERAS)}")
        self._keys = {name: CAMERAS.get(place, place) for name, place in places.items()} or CAMERAS
        self.cameras = tuple(self._keys)
        self._episodes: list[Episode] = []
        if spans == "annotated" or (spans == "all" and self.files.is_annotated):
            fate = "left out" if spans == "annotated" else "taken without text"
            print_once(self.files.missing_text_note(fate=fate))
            for number in share_of([span.task for span in self.files.spans], share):
                if not (span := self.files.spans[number]).fault:
                    length, texts = span.end - span.start + 1, (span.instruction,)
                    self._episodes.append(Episode(f"{number:06d}", span.start, length, texts, span.task))
            if spans == "annotated" and not self._episodes:
                raise UserError(self.files.spans[0].fault if self.files.spans else f"{folder}: no spans")
            self.faults = {f"{n:06d}": span.fault for n, span in enumerate(self.files.spans) if span.fault}
        if spans != "annotated":
            for start, end in self.files.episodes:
                self._episodes.append(Episode(f"recording_{start:07d}", start, end - start + 1))
        self.starts = np.array([each.start for each in self._episodes], np.int64)
        self.lengths = np.array([each.length for each in self._episodes], np.int64)
        what = {"annotated": "annotated spans", "recordings": "all recordings, without instructions"}
        self.scope = f"{folder} ({', '.join(self.cameras)}; {what.get(spans, 'all')})"
        self.left_out = [f"the camera {name} (data.cameras)" for name in CAMERAS if name not in self.cameras]
        self.left_out += ["frames without annotation (data.spans)"] if spans == "annotated" else []
        self.left_out += [f"{1 - share:.0%} of the demonstrations (data.share)"] if share < 1 else []
        others = [s for s in (TRAINING, VALIDATION) if s != folder.name and (folder.parent / s).is_dir()]
        self.left_out += [f"the split {split} (data.split)" for split in others]

    def episode(self, number: int) -> Episode:
        return self._episodes[number]

    def read(self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]) -> dict[str, Frames]:
        numbers, keys = [episode.start + position for position in positions], [self._keys[c] for c in cameras]
        if len(numbers) == 1:
            frames = [self.files.frame(numbers[0], keys)]
        else:
            with ThreadPoolExecutor(READERS) as pool:
                frames = list(pool.map(lambda number: self.files.frame(number, keys), numbers))
        paths = [self.files.path(number) for number in numbers]
        return {c: stack_frames([frame[key] for frame in frames], paths) for c, key in zip(cameras, keys)}

    def check_files(self) -> None:
        spans = zip(self.starts.tolist(), self.lengths.tolist())
        self.files.check_frames(np.unique(np.concatenate([np.arange(s, s + n) for s, n in spans])))

    def read_motions(self, frames: range) -> Float32[np.ndarray, "N A_S"]:
        found = []
        for number in frames:
            frame = self.files.frame(number, ("rel_actions", "robot_obs"))
            check_gripper(self.files.path(number), frame["rel_actions"])
            found.append(np.concatenate([frame["rel_actions"], frame["robot_obs"]]))
        return np.array(found, np.float32)

    def robot(self) -> Robot:
        return calvin_robot(self.cameras)
