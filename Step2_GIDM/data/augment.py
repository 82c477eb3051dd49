"""One augmentation for both frames of a pair: what moved must be motion, not the augmentation."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from defi.errors import UserError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass
class Augmentation:
    """Ranges of the draw.

    crop: share of the picture's area that is kept, at a random place.
    brightness: largest shift of the values in [0, 1]. contrast, saturation: factor in 1 ± the number.
    hue: largest rotation, as a share of the full circle.

    Raises:
        UserError: a number outside [0, 1], or a crop of nothing.
    """

    crop: float = 0.9
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise UserError(f"data.augmentation.crop={self.crop}: must be above 0 and at most 1")
        for name in ("brightness", "contrast", "saturation", "hue"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"data.augmentation.{name}={value}: must be between 0 and 1")

    def apply(
        self, frames: UInt8[Tensor, "N 3 H W"], side: int, rng: np.random.Generator
    ) -> Float[Tensor, "N 3 side side"]:
        """Crop, resize to `side` and recolour all frames by one draw; values in [0, 1]."""
        height, width = frames.shape[-2:]
        h, w = (max(1, round(size * math.sqrt(self.crop))) for size in (height, width))
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        small = TF.resized_crop(frames, top, left, h, w, [side, side], antialias=True)
        return self.recolour(to_unit(small), rng)

    def recolour(
        self, frames: Float[Tensor, "N 3 H W"], rng: np.random.Generator
    ) -> Float[Tensor, "N 3 H W"]:
        """Shift, scale about the mean colour, saturate, rotate the hue: together an affine map of colours."""
        shift = rng.uniform(-self.brightness, self.brightness)
        contrast = 1 + rng.uniform(-self.contrast, self.contrast)
        saturation = 1 + rng.uniform(-self.saturation, self.saturation)
        angle = 2 * math.pi * rng.uniform(-self.hue, self.hue)
        colour = torch.tensor(hue_rotation(angle) @ saturation_matrix(saturation), dtype=torch.float32)
        mean = frames.mean(dim=(0, 2, 3))
        offset = colour @ (mean * (1 - contrast) + shift * contrast)
        matrices = (contrast * colour).expand(len(frames), 3, 3)
        return torch.baddbmm(offset[:, None], matrices, frames.flatten(2)).clamp_(0, 1).view_as(frames)


def resize(frames: UInt8[Tensor, "N 3 H W"], side: int) -> Float[Tensor, "N 3 side side"]:
    """Without augmentation: the whole picture at side × side, values in [0, 1]."""
    return to_unit(TF.resize(frames, [side, side], antialias=True))


def to_unit(frames: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Bytes to [0, 1]."""
    return frames.contiguous().float().div_(255)


def saturation_matrix(factor: float) -> np.ndarray:
    """Colours moved away from (factor > 1) or towards their own grey."""
    return factor * np.eye(3) + (1 - factor) * np.outer(np.ones(3), LUMA)


def hue_rotation(angle: float) -> np.ndarray:
    """Rotation of the colour cube about its grey diagonal (Rodrigues' formula)."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
