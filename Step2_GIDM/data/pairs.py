"""Episodes → pairs of frames some distance apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.utils.data
from jaxtyping import UInt8
from torch import Tensor

from defi.data import Dataset, Episode
from defi.errors import UserError
from Step2_GIDM.data.images import Augmentation, augment, resize


def later(episode: Episode, now: int, distance: int) -> int:
    """Position of the frame `distance` after another; at the episode's end its last."""
    return min(now + distance, episode.length - 1)


class PairDataset(torch.utils.data.Dataset):
    """Every frame of every episode, with the one `distance` frames later; at the end the last, its own too.

    Each camera's view of an episode is a clip; clips are in the order of the cameras, then of the episodes.
    The distance is drawn uniformly from [low, high], and one augmentation for both frames, from the generator
    that the engine makes for (seed, epoch, index).

    lengths: frames of each clip. ends: how many pairs there are up to the end of each.
    """

    def __init__(
        self,
        data: Dataset,
        cameras: Sequence[str],
        *,
        image_size: int,
        distance: Sequence[int],
        stride: int = 1,
        words: bool = True,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.data, self.cameras, self.fingerprint = data, cameras, data.fingerprint
        self.image_size, self.distance, self.stride, self.words = image_size, distance, stride, words
        self.augmentation, self.lengths = augmentation, np.tile(data.lengths, len(cameras))
        if self.lengths.max(initial=0) < 2:
            raise UserError("data: no clip has two frames; give longer videos")
        self.ends = np.cumsum(-(-self.lengths // stride))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def clip(self, number: int) -> tuple[Episode, str]:
        """Episode and camera."""
        camera, episode = divmod(number, len(self.data))
        return self.data.episode(episode), self.cameras[camera]

    def locate(self, index: int) -> tuple[Episode, str, int]:
        """Episode, camera and position of the earlier frame of pair `index`."""
        which = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[which - 1]) if which else 0
        return *self.clip(which), (index - before) * self.stride

    def read(self, episode: Episode, camera: str, positions: Sequence[int]) -> UInt8[Tensor, "N 3 H W"]:
        """Some frames, as they are stored."""
        frames = self.data.read(episode, positions, [camera])[camera]
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def sample(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """`frames` [2, 3, H, W] in [0, 1], `text`: of the earlier frame.

        Without a generator nothing is drawn: the largest distance, no augmentation.
        """
        episode, camera, now = self.locate(index)
        low, high = self.distance
        distance = high if rng is None else int(rng.integers(low, high + 1))
        stored = self.read(episode, camera, [now, later(episode, now, distance)])
        frames = resize(stored, self.image_size)
        if rng is not None and self.augmentation is not None:
            frames = augment(frames, self.augmentation.draw(rng))
        return {"frames": frames, "text": episode.text(now) if self.words else ""}
