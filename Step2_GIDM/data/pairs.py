"""Clips of video → pairs of frames some distance apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from defi.errors import UserError
from Step2_GIDM.data.augment import Augmentation, augment
from Step2_GIDM.data.resize import resize


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


class Source(Protocol):
    """Clips of one data set, and their frames. lengths: of the clips, which may be made only when asked for."""

    clips: Sequence[Clip]
    lengths: Int64[np.ndarray, " C"]

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        """Frames of a clip, counted from its start."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the data."""
        ...


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
        distance: tuple[int, int],
        stride: int = 1,
        augmentation: Augmentation | None = None,
    ) -> None:
        if stride < 1:
            raise UserError(f"data.stride={stride}: must be at least 1")
        self.source, self.image_size, self.distance, self.stride = source, image_size, distance, stride
        self.augmentation = augmentation
        if source.lengths.max(initial=0) < 2:
            raise UserError("data: no clip has two frames; give longer videos")
        self._ends = np.cumsum(-(-source.lengths // stride))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        """Identifies the data, for manifests."""
        return self.source.fingerprint

    def locate(self, index: int) -> tuple[Clip, int]:
        """Clip and position of the earlier frame of pair `index`."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return self.source.clips[which], (index - before) * self.stride

    def frames(self, index: int) -> UInt8[Tensor, "2 3 H W"]:
        """The two frames of pair `index` at the largest distance, as they are stored."""
        return self._read(*self.locate(index), self.distance[1])

    def _read(self, clip: Clip, now: int, distance: int) -> UInt8[Tensor, "2 3 H W"]:
        pair = self.source.read(clip, clip.pair(now, distance))
        return torch.from_numpy(pair).permute(0, 3, 1, 2)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`frames` [2, 3, H, W] in [0, 1], `text`: of the earlier frame."""
        clip, now = self.locate(index)
        distance = int(rng.integers(self.distance[0], self.distance[1] + 1))
        frames = resize(self._read(clip, now, distance), self.image_size)
        if self.augmentation is not None:
            frames = augment(frames, self.augmentation.draw(rng))
        return {"frames": frames, "text": clip.text(now)}
