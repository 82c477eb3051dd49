"""Clips of video → pairs of frames some distance apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from defi.errors import UserError
from Step2_GIDM.data.augment import Augmentation, resize


@dataclass(frozen=True)
class Clip:
    """Consecutive frames. `name` says where they are, `text` what happens in them ("" if unknown)."""

    name: str
    start: int
    length: int
    text: str = ""


class Source(Protocol):
    """Clips of one data set, and their frames."""

    clips: Sequence[Clip]

    def read(self, clip: Clip, positions: Sequence[int]) -> UInt8[np.ndarray, "N H W 3"]:
        """Frames of a clip, counted from its start."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the data."""
        ...


class PairDataset(Dataset):
    """Every frame of every clip but its last, with one `distance` frames later (at the end: the last frame).

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
        starts = [-(-max(0, clip.length - 1) // stride) for clip in source.clips]  # a clip may be empty
        self._ends = np.cumsum(starts)
        if not len(starts) or self._ends[-1] == 0:
            raise UserError("data: no clip has two frames; give longer videos")

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

    def frames(self, index: int, distance: int | None = None) -> UInt8[Tensor, "2 3 H W"]:
        """The two frames of pair `index`, as they are stored. distance: None for the largest."""
        clip, now = self.locate(index)
        distance = self.distance[1] if distance is None else distance
        pair = self.source.read(clip, [now, min(now + distance, clip.length - 1)])
        return torch.from_numpy(pair).permute(0, 3, 1, 2)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`frames` [2, 3, H, W] in [0, 1], `text`."""
        frames = self.frames(index, int(rng.integers(self.distance[0], self.distance[1] + 1)))
        if self.augmentation is None:
            frames = resize(frames, self.image_size)
        else:
            frames = self.augmentation.apply(frames, self.image_size, rng)
        return {"frames": frames, "text": self.locate(index)[0].text}
