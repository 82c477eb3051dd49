"""Frames of a pair: at the size that the model sees, and augmented alike.

Both as the published code does it: TensorFlow's Lanczos3 with antialias, then tf.image's operations in its
order, values clipped to [0, 1] after each.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from defi.errors import UserError

LOBES = 3  # of the kernel sinc(x) sinc(x/3), on either side
BAND = 32  # rows of a matrix that are multiplied at once: most others of its columns are 0 there


def resize(frames: UInt8[Tensor, "N 3 H W"], side: int) -> Float[Tensor, "N 3 side side"]:
    """All of a picture at side × side, whatever its shape was; integer levels / 255, in [0, 1].

    Pillow's filter rounds to bytes between its two passes (up to 7 levels off); on floats it takes three
    times as long as this.
    """
    small = torch.empty(len(frames), 3, side, side)
    for frame, out in zip(frames, small):  # one by one: their planes fit into a core's cache
        planes = frame.float().contiguous()
        tall = planes.new_empty(3, side, planes.shape[-1])
        for rows, taken, weights in bands(planes.shape[-2], side):
            torch.bmm(weights.expand(3, -1, -1), planes[:, taken], out=tall[:, rows])
        for columns, taken, weights in bands(planes.shape[-1], side):
            torch.matmul(tall[..., taken], weights.T, out=out[..., columns])
    return small.round_().clamp_(0, 255).div_(255)


@lru_cache(maxsize=64)
def bands(size: int, side: int) -> list[tuple[slice, slice, Float[Tensor, "b k"]]]:
    """The matrix [side, size] that resizes a line, in bands: their rows, the columns they need, the weights.

    Pixels are half a pixel from their edges; where the line shrinks, the kernel widens.
    """
    scale = size / side
    centres = (np.arange(side) + 0.5) * scale
    x = (np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
    kernel = np.where(np.abs(x) < LOBES, np.sinc(x) * np.sinc(x / LOBES), 0)
    matrix = torch.from_numpy((kernel / kernel.sum(1, keepdims=True)).astype(np.float32))
    found = []
    for first in range(0, side, BAND):
        band = matrix[first : first + BAND]
        columns = band.any(0).nonzero()
        taken = slice(int(columns[0]), int(columns[-1]) + 1)
        found.append((slice(first, first + len(band)), taken, band[:, taken].contiguous()))
    return found


class Draw(NamedTuple):
    """What is done to the frames of one pair."""

    side: float  # of the crop, as a share of the picture's side, like its place
    top: float
    left: float
    brightness: float  # added to all values
    contrast: float  # factor of the distance from the mean
    saturation: float  # factor
    hue: float  # rotation, as a share of the circle


@dataclass
class Augmentation:
    """Ranges of the draw.

    crop: share of the picture's area that is kept, at a random place.
    brightness: largest shift of the values in [0, 1]. contrast, saturation: factor in 1 ± the number.
    hue: largest rotation, as a share of the full circle.
    """

    crop: float = 0.9
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1 or (name == "crop" and value == 0):
                limits = "above 0 and at most 1" if name == "crop" else "between 0 and 1"
                raise UserError(f"data.augmentation.{name}={value}: must be {limits}")

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

    # Rows are contiguous: five times as fast.
    columns = rows(rows(frames, draw.top).mT.contiguous(), draw.left)
    return columns.mT.contiguous()


def recolour(frames: Float[Tensor, "N 3 S S"], saturation: float, hue: float) -> Float[Tensor, "N 3 S S"]:
    """Saturation times a factor and hue rotated, in HSV: the largest channel, V, stays, none gets below 0.

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
