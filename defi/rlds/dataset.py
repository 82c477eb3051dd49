"""Any frame of any episode of an RLDS data set, by number."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from defi.archive import read_places
from defi.errors import UserError
from defi.frames import stack_frames
from defi.picture import decode_picture
from defi.processes import print_once
from defi.rlds.index import open_index, read_texts
from defi.rlds.spec import FEATURES, STEPS, choose_split, find_version, read_spec, read_splits
from defi.rlds.tfrecord import BYTES, FLOATS, Values, parse_example

# Where data sets keep their instruction, in order of preference.
LANGUAGE = ("language_instruction", "observation/natural_language_instruction", "observation/instruction")
INDEX_FOLDER = Path("data/rlds_index")
FEW = ("train[:-1]", "train[-1:]")  # splits of so few episodes that 5 % of them are none


def default_splits(folder: str | Path) -> tuple[str, str]:
    """Splits for training and for holding out: `val` where there is one, else the end of `train`.

    The end is 5 %, or the last episode (`FEW`). Where there is nothing but `val` (Ego4D), it serves for both.

    Raises:
        UserError: there is neither `train` nor `val`.
    """
    version = find_version(Path(folder))
    there = read_splits(version)
    if "val" in there:
        return "train" if "train" in there else "val", "val"
    _, whole = choose_split(version, there, "train")
    return ("train[:95%]", "train[95%:]") if round(0.95 * len(whole)) < len(whole) else FEW


class RLDSDataset:
    """One split, or a slice of it, of a TFDS folder of episodes; episodes in the order of its files.

    Args:
        folder: `<data set>/<version>`, or `<data set>`: its highest version.
        split: as TFDS names them: `train`, `train[:95%]`, `val[10:20]`.
        index: folder that keeps indices; the first opening of a split reads it once, and checks it all.

    Raises:
        UserError: what is missing or damaged is named with file and position.
    """

    def __init__(self, folder: str | Path, split: str = "train", *, index: str | Path = INDEX_FOLDER) -> None:
        self.folder = find_version(Path(folder))
        self.name = self.folder.resolve().parent.name
        self.spec = read_spec(self.folder)
        self.split, chosen = choose_split(self.folder, read_splits(self.folder), split)
        self.index = open_index(self.folder, self.split, self.spec, Path(index))
        self.first = chosen.start
        self._episodes = self.index.episodes[chosen.start : chosen.stop]
        firsts = np.append(self.index.episodes[:, 3], self.index.frames)
        self.lengths = np.diff(firsts)[chosen.start : chosen.stop]
        self.fingerprint = f"{self.index.fingerprint}-{split}"

    def __len__(self) -> int:
        """Episodes."""
        return len(self._episodes)

    @cached_property
    def pictures(self) -> list[str]:
        """Features that hold RGB pictures, as paths below `steps/`."""
        return list(self.index.pictures)

    def picture(self, key: str | None) -> str:
        """The feature that `key` means: itself, or within `observation`; None: the only one there is.

        Raises:
            UserError: there is none, or None could mean several.
        """
        matching = [name for name in self.pictures if key in (None, name, name.removeprefix("observation/"))]
        if len(matching) != 1:
            listed = ", ".join(name.removeprefix("observation/") for name in self.pictures)
            raise UserError(f"{self.folder / FEATURES}: image={key}: choose one of {listed}")
        return matching[0]

    def language(self, key: str | None) -> str | None:
        """The feature that holds instructions: `key`, or for None the usual places; None if there is none.

        A printed line tells of texts in it that are not UTF-8.

        Raises:
            UserError: the data set has no such feature.
        """
        if key is None:
            key = next((name for name in LANGUAGE if name in self.index.texts), None)
        elif key not in self.index.texts:
            found = ", ".join(self.index.texts) or "no text in its steps"
            raise UserError(f"{self.folder / FEATURES}: language={key}: there is {found}")
        if damaged := self.index.damaged.get(key):
            what = f"texts of {key} that are not UTF-8 count as missing ({len(damaged)}, as {damaged[0]!r})"
            print_once(f"{self.folder}: split {self.split.name}: {what}")
        return key

    def text(self, episode: int, language: str | None) -> str:
        """What a feature of text says at an episode's first step ("" for None)."""
        return next(iter(self.texts(episode, language, slice(1))), "")

    def texts(self, episode: int, language: str | None, steps: slice) -> tuple[str, ...]:
        """What a feature of text says at some steps of an episode; only once where all say the same."""
        if language is None:
            return ("",)
        distinct, ids = self.index.texts[language]
        first = int(self._episodes[episode, 3])
        found = ids[first : first + int(self.lengths[episode])][steps]
        same = len(found) > 0 and bool((found == found[0]).all())
        return tuple(distinct[i] for i in (found[:1] if same else found))

    def labelled(self, language: str | None, trim: Sequence[int]) -> Bool[np.ndarray, " E"]:
        """Episodes with a text at any of their steps, the first `trim[0]` and the last `trim[1]` aside."""
        if language is None:
            return np.zeros(len(self), bool)
        distinct, ids = self.index.texts[language]
        firsts = self._episodes[:, 3]
        begin, end = int(firsts[0]), int(firsts[-1] + self.lengths[-1])
        said = np.array([text != "" for text in distinct], bool)[ids[begin:end]]
        before = np.concatenate([[0], np.cumsum(said)])  # texts before each step

        def upto(steps: Int64[np.ndarray, " E"]) -> Int64[np.ndarray, " E"]:
            return before[(steps - begin).clip(0, end - begin)]

        return upto(firsts + self.lengths - trim[1]) > upto(firsts + trim[0])

    def shard(self, episode: int) -> Path:
        """The file that holds an episode."""
        return self.split.shards[self._episodes[episode, 0]]

    def encoded(self, episode: int, steps: Sequence[int], picture: str) -> list[bytes]:
        """Pictures of some steps as they are stored (JPEG or PNG)."""
        rows = self._episodes[episode, 3] + np.asarray(steps)
        places = [(int(start), int(end)) for start, end in self.index.pictures[picture][rows]]
        return read_places(self.shard(episode), places)

    def frames(self, episode: int, steps: Sequence[int], picture: str) -> UInt8[np.ndarray, "N H W 3"]:
        """Pictures of some steps; nothing else is read or decoded.

        Raises:
            UserError: a picture is damaged, or of another size than the first.
        """
        frames = []
        places = [f"{self.shard(episode)}: episode {episode}, step {step}" for step in steps]
        for place, coded in zip(places, self.encoded(episode, steps, picture)):
            try:
                frames.append(decode_picture(coded))
            except ValueError as error:
                raise UserError(f"{place}: {picture} is no picture ({error}); copy the file again") from None
        return stack_frames(frames, places)

    def values(self, episode: int, name: str) -> np.ndarray | list[str]:
        """A feature of all steps (say, `action`): an array [steps, ...], or a list of texts.

        Raises:
            UserError: there is no such feature, it is not of a kind that is read, or the record is damaged.
        """
        feature = self.spec.get(STEPS + name)
        if feature is None or feature.kind not in ("tensor", "text"):
            kind = "missing" if feature is None else f"a {feature.kind}"
            raise UserError(
                f"{self.folder / FEATURES}: {STEPS + name} is {kind}; only tensors and text are read"
            )
        _, offset, length, _ = (int(n) for n in self._episodes[episode])
        (data,) = read_places(self.shard(episode), [(offset, offset + length)])
        try:
            values = parse_example(data)[STEPS + name]
            if feature.kind == "text":
                return read_texts(values, data, feature)
            shape = [-1 if n is None else n for n in feature.shape]
            return _numbers(values, data).astype(feature.dtype).reshape(int(self.lengths[episode]), *shape)
        except (ValueError, KeyError, IndexError) as error:
            where = f"{self.shard(episode)}: episode {episode}"
            raise UserError(f"{where}: cannot read {STEPS + name} ({error}); copy the file again") from None


def _numbers(values: Values, data: bytes) -> np.ndarray:
    if values.kind == BYTES:
        raise ValueError("it is text")
    return values.floats(data) if values.kind == FLOATS else values.ints(data)
