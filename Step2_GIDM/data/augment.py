"""One augmentation for both frames of a pair: what moved must be motion, not the augmentation.

The operations are those of the published code (tf.image's, through dlimp): on pictures of the model's size,
values cut to [0, 1] after each.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from defi.errors import UserError
from Step2_GIDM.data.resize import to_unit


@dataclass(frozen=True)
class Draw:
    """What is done to the frames of one pair.

    side, top, left: of the crop, as shares of the picture's side. brightness: what is added to all values.
    contrast: factor of the distance from the mean. saturation: factor. hue: rotation, as a share of the circle.
    """

    side: float
    top: float
    left: float
    brightness: float
    contrast: float
    saturation: float
    hue: float


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

    def draw(self, rng: np.random.Generator) -> Draw:
        """One draw, uniform in each range."""
        side = math.sqrt(self.crop)
        top, left = rng.uniform(0, 1 - side, 2)
        shift = rng.uniform(-self.brightness, self.brightness)
        contrast, saturation = (1 + rng.uniform(-r, r) for r in (self.contrast, self.saturation))
        return Draw(side, top, left, shift, contrast, saturation, rng.uniform(-self.hue, self.hue))


def augment(frames: UInt8[Tensor, "N 3 S S"], draw: Draw) -> UInt8[Tensor, "N 3 S S"]:
    """All frames cropped and recoloured by one draw; contrast is about each picture's own mean."""
    unit = crop(to_unit(frames), draw)
    unit = unit.add_(draw.brightness).clamp_(0, 1)
    mean = unit.mean((2, 3), keepdim=True)
    unit = torch.lerp(mean, unit, draw.contrast).clamp_(0, 1)
    unit = recolour(unit, draw.saturation, draw.hue).clamp_(0, 1)
    return unit.mul_(255.5).byte()  # cut, not rounded: how TensorFlow turns [0, 1] into bytes


def crop(frames: Float[Tensor, "N 3 S S"], draw: Draw) -> Float[Tensor, "N 3 S S"]:
    """A square of each picture at the size of the whole, bilinear; corner pixels stay corners."""
    size = frames.shape[-1]

    def taps(first: float) -> tuple[Tensor, Tensor]:
        """The pixel before each place along a side, and how far beyond it the place is."""
        places = torch.linspace(first, first + draw.side, size, dtype=torch.float64) * (size - 1)
        before = places.floor().clamp_(0, max(0, size - 2))
        return before.long(), (places - before).float()

    def between(lines: Tensor, axis: int, first: float) -> Tensor:
        before, beyond = taps(first)
        beyond = beyond.unsqueeze(-1) if axis == -2 else beyond
        after = (before + 1).clamp_(max=size - 1)
        return torch.lerp(lines.index_select(axis, before), lines.index_select(axis, after), beyond)

    return between(between(frames, -2, draw.top), -1, draw.left)


def recolour(frames: Float[Tensor, "N 3 S S"], saturation: float, hue: float) -> Float[Tensor, "N 3 S S"]:
    """Saturation times a factor and hue rotated, in HSV: V is the largest channel, and stays."""
    value, lowest = frames.amax(1, keepdim=True), frames.amin(1, keepdim=True)
    red, green, blue = frames.split(1, dim=1)
    chroma = value - lowest
    sixth = 1 / chroma.clamp(min=1e-12)  # a grey has no hue; its chroma of 0 makes any do
    angle = torch.where(value == green, (blue - red) * sixth + 2, (red - green) * sixth + 4)
    angle = torch.where(value == red, (green - blue) * sixth, angle)  # in sixths of the circle
    chroma = torch.minimum(chroma * saturation, value)
    peaks = torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)  # of red, green and blue, opposite to where they are 0
    distance = (angle + (6 * hue + peaks)) % 6
    return value - chroma * torch.minimum(distance, 4 - distance).clamp_(0, 1)
