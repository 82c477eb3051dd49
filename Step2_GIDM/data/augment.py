"""One augmentation for both frames of a pair: what moved must be motion, not the augmentation.

The operations and their order are the published code's (tf.image's): on pictures of the model's size, values
clipped to [0, 1] after each.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from defi.errors import UserError


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


def augment(frames: Float[Tensor, "N 3 S S"], draw: Draw) -> Float[Tensor, "N 3 S S"]:
    """All frames, in [0, 1], cropped and recoloured by one draw; contrast is about each picture's own mean.

    The result is whole levels / 255, truncated, not rounded, as TensorFlow turns [0, 1] into bytes.
    """
    frames = crop(frames, draw).add_(draw.brightness).clamp_(0, 1)
    mean = frames.mean((2, 3), keepdim=True)
    frames = torch.lerp(mean, frames, draw.contrast).clamp_(0, 1)
    return recolour(frames, draw.saturation, draw.hue).mul_(255.5).floor_().div_(255)


def crop(frames: Float[Tensor, "N 3 S S"], draw: Draw) -> Float[Tensor, "N 3 S S"]:
    """A square of each picture, enlarged to the picture's size, bilinear; corner pixels stay corners."""
    size = frames.shape[-1]

    def rows(lines: Tensor, first: float) -> Tensor:
        places = torch.linspace(first, first + draw.side, size, dtype=torch.float64) * (size - 1)
        above = places.floor().long().clamp_(0, size - 1)
        below = (above + 1).clamp_(max=size - 1)
        beyond = (places - above).float().unsqueeze(-1)
        return torch.lerp(lines.index_select(-2, above), lines.index_select(-2, below), beyond)

    columns = rows(rows(frames, draw.top).mT.contiguous(), draw.left)  # rows are contiguous: five times as fast
    return columns.mT.contiguous()


def recolour(frames: Float[Tensor, "N 3 S S"], saturation: float, hue: float) -> Float[Tensor, "N 3 S S"]:
    """Saturation times a factor and hue rotated, in HSV: the largest channel, V, stays, and none gets below 0.

    Arithmetic alone: comparisons and `where` take ten times as long on a CPU.
    """
    red, green, blue = frames.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = (chroma + 1e-12).reciprocal_()  # a grey has no hue, and with a chroma of 0 needs none
    r, g, b = (value[:, None] - frames).mul_(scale[:, None]).unbind(1)  # how far below V, in shares of chroma
    angle = torch.lerp(2 + r - b, 4 + g - r, g.sign())  # in sixths of the circle: green is V, or blue …
    angle = torch.lerp(angle, b - g, 1 - r.sign())  # … or red
    angle.add_(6 * hue)
    angle.sub_((angle / 6).floor_(), alpha=6)
    chroma = torch.minimum(chroma.mul_(saturation), value)
    below = (2 - (angle - 3).abs_(), (angle - 2).abs_().sub_(1), (angle - 4).abs_().sub_(1))
    out = torch.empty_like(frames)
    for channel, share in zip(out.unbind(1), below):
        torch.addcmul(value, share.clamp_(0, 1), chroma, value=-1, out=channel)
    return out
