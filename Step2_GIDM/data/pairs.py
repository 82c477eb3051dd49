"""Clips of video → pairs of frames some distance apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from defi.errors import UserError
from Step2_GIDM.data.augment import Augmentation, augment
from Step2_GIDM.data.resize import resize

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

    held_out: the part for pictures and health. weight: in a mixture. distance: [low, high], frames between the
    two of a pair. stride: frames between the starts of pairs.
    """

    root: str
    held_out: str | None
    weight: float = 1.0
    distance: list[int]
    stride: int
    augmentation: Augmentation | None

    def __post_init__(self) -> None:
        if len(self.distance) != 2 or not 1 <= self.distance[0] <= self.distance[1] <= FARTHEST:
            limits = f"with 1 <= low <= high <= {FARTHEST:,}"
            raise UserError(f"data.distance={self.distance}: must be [low, high] {limits}")

    def open(self, part: Part) -> Source:
        """The clips that are trained on, those that are held out, or all that the section does not leave out."""
        raise NotImplementedError

    def size(self, pairs: "PairDataset") -> int:
        """What a share in a mixture counts."""
        return len(pairs)


class PairDataset(Dataset):
    """Every frame of every clip, with the one `distance` frames later: at the end the last frame, its own too.

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
        if stride < 1:
            raise UserError(f"data.stride={stride}: must be at least 1")
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

    def frames(self, index: int) -> UInt8[Tensor, "2 3 H W"]:
        """The two frames of pair `index` at the largest distance, as they are stored."""
        return self._read(*self.locate(index), self.distance[1])

    def _read(self, clip: Clip, now: int, distance: int) -> UInt8[Tensor, "2 3 H W"]:
        return torch.from_numpy(self.source.read(clip, clip.pair(now, distance))).permute(0, 3, 1, 2)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`frames` [2, 3, H, W] in [0, 1], `text`: of the earlier frame."""
        clip, now = self.locate(index)
        distance = int(rng.integers(self.distance[0], self.distance[1] + 1))
        frames = resize(self._read(clip, now, distance), self.image_size)
        if self.augmentation is not None:
            frames = augment(frames, self.augmentation.draw(rng))
        return {"frames": frames, "text": clip.text(now)}
