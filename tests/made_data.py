"""A data set that is made up, for tests of what uses one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from defi.data import Dataset, Episode


class MadeData(Dataset):
    """Episodes `0`, `1`, … of some lengths; `frames(episode, positions)` [N, H, W, 3] are what is seen."""

    root, fingerprint, scope = Path("made up"), "made up", "made up"

    def __init__(
        self,
        lengths: Sequence[int],
        frames: Callable[[int, Sequence[int]], np.ndarray],
        *,
        texts: Callable[[int], tuple[str, ...]] = lambda number: ("",),
        cameras: Sequence[str] = ("front",),
    ) -> None:
        self.lengths, self.cameras = np.array(lengths), tuple(cameras)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._frames, self._texts = frames, texts

    def episode(self, number: int) -> Episode:
        start, length = int(self.starts[number]), int(self.lengths[number])
        return Episode(str(number), start, length, self._texts(number))

    def read(
        self, episode: Episode, positions: Sequence[int], cameras: Sequence[str]
    ) -> dict[str, np.ndarray]:
        seen = self._frames(int(episode.name), positions)
        return {camera: seen + np.uint8(self.cameras.index(camera)) for camera in cameras}
