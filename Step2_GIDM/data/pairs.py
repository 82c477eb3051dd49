"""Clips of video → pairs of frames some distance apart, of one data set or several."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from defi.errors import UserError
from Step2_GIDM.data.images import Augmentation, augment, resize

Part = Literal["training", "held_out", "all"]
FARTHEST = 10**6  # frames between the two of a pair: hours of video


@dataclass(frozen=True)
class Clip:
    """Consecutive frames. `name` says where they are.

    texts: what happens in them ("" if unknown): of each frame, or one for all.
    """

    name: str
    start: int
    length: int
    texts: tuple[str, ...] = ("",)

    def text(self, position: int) -> str:
        """Of a frame, counted from the clip's start."""
        return self.texts[position if len(self.texts) > 1 else 0]

    def pair(self, now: int, distance: int) -> tuple[int, int]:
        """Positions of a frame and of the one `distance` later; at the clip's end, its last."""
        return now, min(now + distance, self.length - 1)


class Source:
    """Clips of one data set, and their frames.

    clips: a list, or none where `clip` makes each when asked for: there may be millions.
    fingerprint: identifies the data. scope: what the clips are of. left_out: what else the data set holds.
    """

    clips: Sequence[Clip]
    fingerprint: str
    scope: str
    left_out: Sequence[str]

    @cached_property
    def lengths(self) -> Int64[np.ndarray, " C"]:
        """Frames of each clip."""
        return np.array([clip.length for clip in self.clips], np.int64)

    def clip(self, number: int) -> Clip:
        """A clip by its number; where there are millions, it is made now."""
        return self.clips[number]

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        """Frames of a clip, counted from its start."""
        raise NotImplementedError


@dataclass(kw_only=True)
class PairsSettings:
    """What every data set's section says; the defaults are those of configs/data/pairs_<source>.yaml.

    held_out: the part for pictures and health. weight: in a mixture. distance: [low, high], frames between
    the two of a pair. stride: frames between the starts of pairs.
    """

    root: str
    held_out: str | None
    weight: float = 1.0
    distance: list[int]
    stride: int
    augmentation: Augmentation | None

    def __post_init__(self) -> None:
        if len(self.distance) != 2 or not 1 <= self.distance[0] <= self.distance[1] <= FARTHEST:
            must = f"must be [low, high] with 1 <= low <= high <= {FARTHEST:,}"
            raise UserError(f"data.distance={self.distance}: {must}")
        if self.stride < 1:
            raise UserError(f"data.stride={self.stride}: must be at least 1")

    def open(self, part: Part) -> Source:
        """The clips that are trained on, those held out, or all that the section does not leave out."""
        raise NotImplementedError

    def size(self, pairs: "PairDataset") -> int:
        """What a share in a mixture counts."""
        return len(pairs)


class PairDataset(Dataset):
    """Every frame of every clip, with the one `distance` frames later; at the end the last, its own too.

    The distance is drawn uniformly from [low, high], and one augmentation for both frames, from the generator
    that the engine makes for (seed, epoch, index).
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        distance: Sequence[int],
        stride: int = 1,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.source, self.image_size, self.distance, self.stride = source, image_size, distance, stride
        self.augmentation, self.fingerprint = augmentation, source.fingerprint
        if source.lengths.max(initial=0) < 2:
            raise UserError("data: no clip has two frames; give longer videos")
        self._ends = np.cumsum(-(-source.lengths // stride))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[Clip, int]:
        """Clip and position of the earlier frame of pair `index`."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return self.source.clip(which), (index - before) * self.stride

    def frames(self, clip: Clip, now: int, distance: int) -> UInt8[Tensor, "2 3 H W"]:
        """A frame of a clip and the one `distance` later, as they are stored."""
        return torch.from_numpy(self.source.read(clip, clip.pair(now, distance))).permute(0, 3, 1, 2)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """`frames` [2, 3, H, W] in [0, 1], `text`: of the earlier frame.

        Without a generator nothing is drawn: the largest distance, no augmentation.
        """
        clip, now = self.locate(index)
        low, high = self.distance
        distance = high if rng is None else int(rng.integers(low, high + 1))
        frames = resize(self.frames(clip, now, distance), self.image_size)
        if rng is not None and self.augmentation is not None:
            frames = augment(frames, self.augmentation.draw(rng))
        return {"frames": frames, "text": clip.text(now)}


class PairMixture(Dataset):
    """Several data sets as one. An epoch has `places` for each: its weight times its size, rounded.

    With twice as many places as pairs each pair of the set comes twice in an epoch; with a tenth a place
    stands for ten neighbouring pairs, of which the sample's generator draws one. The order over all places is
    the engine's.
    """

    def __init__(self, sets: Mapping[str, PairDataset], places: Mapping[str, int]) -> None:
        self.sets, self.places = sets, places
        self._ends = np.cumsum([places[name] for name in sets])
        lines = "".join(f"{name} {data.fingerprint} {places[name]}\n" for name, data in sets.items())
        self.fingerprint = hashlib.sha256(lines.encode()).hexdigest()[:16]

    def shares(self) -> dict[str, float]:
        """Share of each set in an epoch."""
        return {name: count / len(self) for name, count in self.places.items()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def member(self, index: int, u: float) -> tuple[PairDataset, int]:
        """The set and its pair at place `index`; u in [0, 1) chooses among the pairs the place stands for."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        name = list(self.sets)[which]
        pairs, count = self.sets[name], self.places[name]
        place = index - int(self._ends[which]) + count
        return pairs, min(int((place + u) * len(pairs) / count), len(pairs) - 1)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """As the set's, of a pair at a place; without a generator the first."""
        pairs, pair = self.member(index, 0 if rng is None else rng.random())
        return pairs.sample(pair, rng)
