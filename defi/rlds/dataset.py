"""Any frame of any episode of an RLDS data set, by number."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from defi.archive import read_places
from defi.errors import UserError, reading
from defi.instructions import is_utf8
from defi.picture import decode_picture, stack_frames
from defi.processes import print_once
from defi.rlds.index import open_index, read_texts
from defi.rlds.spec import FEATURES, STEPS, choose_split, find_version, read_spec, read_splits
from defi.rlds.tfrecord import FIX, parse_example

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
    splits = read_splits(version)
    if "val" in splits:
        return "train" if "train" in splits else "val", "val"
    _, episodes = choose_split(version, splits, "train")
    return ("train[:95%]", "train[95%:]") if round(0.95 * len(episodes)) < len(episodes) else FEW


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
        self.first, part = chosen.start, slice(chosen.start, chosen.stop)
        steps = self.index.episodes[:, 2]
        self._files = np.repeat(np.arange(len(self.split.shards)), self.split.lengths)[part]
        self._records, self._firsts = self.index.episodes[part, :2], (steps.cumsum() - steps)[part]
        self.lengths = steps[part].copy()
        self.fingerprint = f"{self.index.fingerprint}-{split}"
        self.pictures = list(self.index.pictures)  # features that hold RGB pictures, as paths below `steps/`

    def __len__(self) -> int:
        """Episodes."""
        return len(self.lengths)

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

        Texts in it that are not UTF-8 are printed.

        Raises:
            UserError: the data set has no such feature.
        """
        if key is None:
            key = next((name for name in LANGUAGE if name in self.index.texts), None)
        elif key not in self.index.texts:
            found = ", ".join(self.index.texts) or "no text in its steps"
            raise UserError(f"{self.folder / FEATURES}: language={key}: there is {found}")
        if damaged := [text for text in self.index.texts[key][0] if not is_utf8(text)] if key else []:
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
        distinct, numbers = self.index.texts[language]
        first = self._firsts[episode]
        found = numbers[first : first + self.lengths[episode]][steps]
        if len(found) and (found == found[0]).all():
            found = found[:1]
        return tuple(distinct[i] if is_utf8(distinct[i]) else "" for i in found)

    def labelled(self, language: str | None, trim: Sequence[int]) -> Bool[np.ndarray, " E"]:
        """Episodes with a text at any of their steps, the first `trim[0]` and the last `trim[1]` aside."""
        if language is None:
            return np.zeros(len(self), bool)
        distinct, numbers = self.index.texts[language]
        begin, end = self._firsts[0], self._firsts[-1] + self.lengths[-1]
        has_text = np.array([text != "" and is_utf8(text) for text in distinct], bool)[numbers[begin:end]]
        before = np.append(0, np.cumsum(has_text))  # texts before each step
        starts, ends = self._firsts - begin + trim[0], self._firsts - begin + self.lengths - trim[1]
        return before[ends.clip(0, end - begin)] > before[starts.clip(0, end - begin)]

    def shard(self, episode: int) -> Path:
        """The file that holds an episode."""
        return self.split.shards[self._files[episode]]

    def encoded(self, episode: int, steps: Sequence[int], picture: str) -> list[bytes]:
        """Pictures of some steps as they are stored (JPEG or PNG)."""
        rows = self._firsts[episode] + np.asarray(steps)
        return read_places(self.shard(episode), self.index.pictures[picture][rows].tolist())

    def frames(self, episode: int, steps: Sequence[int], picture: str) -> UInt8[np.ndarray, "N H W 3"]:
        """Pictures of some steps; nothing else is read or decoded.

        Raises:
            UserError: a picture is damaged, or of another size than the first.
        """
        places = [f"{self.shard(episode)}: episode {episode}, step {step}: {picture}" for step in steps]
        coded = self.encoded(episode, steps, picture)
        return stack_frames([decode_picture(*each) for each in zip(coded, places)], places)

    def values(self, episode: int, name: str) -> np.ndarray | list[str]:
        """A feature of all steps (say, `action`): an array [steps, ...], or a list of texts.

        Raises:
            UserError: there is no such feature, it is not of a kind that is read, or the record is damaged.
        """
        feature = self.spec.get(STEPS + name)
        if feature is None or feature.kind not in ("tensor", "text"):
            kind = "missing" if feature is None else f"a {feature.kind}"
            raise UserError(f"{self.folder / FEATURES}: {STEPS}{name} is {kind}; tensors and text are read")
        (data,) = read_places(self.shard(episode), [tuple(self._records[episode].tolist())])
        with reading(f"{self.shard(episode)}: episode {episode}: {STEPS}{name}", FIX):
            values = parse_example(data)[STEPS + name]
            if feature.kind == "text":
                return read_texts(values, data, feature)
            shape = [-1 if size is None else size for size in feature.shape]
            return values.numbers(data).astype(feature.dtype).reshape(self.lengths[episode], *shape)
