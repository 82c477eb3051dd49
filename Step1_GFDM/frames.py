"""Short clips of pictures for the VAE, straight from demonstrations in CALVIN's format."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from defi.calvin import CalvinFolder
from defi.config import typed
from defi.engine.data import readable
from defi.errors import UserError
from defi.video import prepare_frames


@dataclass
class FramesConfig:
    """root: data set in CALVIN's format. split: of it, for training; held_out: for pictures and figures.

    frames: F of a clip. stride: frames between them. cameras: camera -> its share of the clips.
    """

    root: str
    split: str = "training"
    held_out: str = "validation"
    frames: int = 2
    stride: int = 3
    cameras: dict[str, float] = field(default_factory=lambda: {"static": 0.5, "gripper": 0.5})

    def __post_init__(self) -> None:
        if min(self.frames, self.stride) < 1:
            raise UserError(f"data.frames={self.frames}, data.stride={self.stride}: must be at least 1")
        if not self.cameras or set(self.cameras) - {"static", "gripper"} or min(self.cameras.values()) <= 0:
            raise UserError(f"data.cameras={self.cameras}: give static and gripper positive shares")


class FrameClips(Dataset):
    """One clip per frame of the recordings; its camera is drawn, its end clamped to the recording's."""

    def __init__(self, cfg: Mapping[str, Any], image_size: int, *, held_out: bool = False) -> None:
        """cfg: the `data` section of a configuration."""
        self.config, self.image_size = typed(FramesConfig, cfg, "data"), image_size
        split = self.config.held_out if held_out else self.config.split
        self.data = CalvinFolder(f"{self.config.root}/{split}")
        self.starts = [(frame, end) for start, end in self.data.episodes for frame in range(start, end + 1)]
        self.fingerprint = self.data.fingerprint

    def __len__(self) -> int:
        return len(self.starts)

    def clip(self, index: int, camera: str) -> Float[Tensor, "F 3 H W"]:
        """Frames in [-1, 1] of one camera, from the `index`-th frame on."""
        first, last = self.starts[index]
        wanted = [min(first + i * self.config.stride, last) for i in range(self.config.frames)]
        return prepare_frames(self.data.stack(f"rgb_{camera}", wanted), self.image_size)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """{"frames": [F, 3, H, W]}, determined by index and rng."""
        shares = np.array(list(self.config.cameras.values()))
        camera = str(rng.choice(list(self.config.cameras), p=shares / shares.sum()))
        return {"frames": self.clip(index, camera)}

    def spread(self, count: int) -> Float[Tensor, "N F 3 H W"]:
        """`count` clips spread evenly over the data, cameras in turn; what cannot be read is left out."""
        indices = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        wanted = zip(indices.tolist(), itertools.cycle(self.config.cameras))
        return torch.stack([clip for _, clip in readable(lambda each: self.clip(*each), wanted)])
