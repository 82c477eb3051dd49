"""Pictures at the size that the model sees, as the published code resizes them: Lanczos3 with antialias.

Pillow's filter rounds to bytes between its two passes (up to 7 levels off); on floats it takes three times as
long as this.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

LOBES = 3  # of the kernel sinc(x) sinc(x/3), on either side
BAND = 32  # rows of a matrix that are multiplied at once: most others of its columns are 0 there
Band = tuple[slice, slice, Float[Tensor, "b k"]]


def resize(frames: UInt8[Tensor, "N 3 H W"], side: int) -> Float[Tensor, "N 3 side side"]:
    """All of a picture at side × side, whatever its shape was; integer levels / 255, in [0, 1]."""
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
def bands(size: int, side: int) -> list[Band]:
    """The matrix [side, size] that resizes a line, in bands: their rows, the columns they need, the weights."""
    matrix, found = torch.from_numpy(lanczos(size, side)), []
    for first in range(0, side, BAND):
        band = matrix[first : first + BAND]
        columns = band.any(0).nonzero()
        taken = slice(int(columns[0]), int(columns[-1]) + 1)
        found.append((slice(first, first + len(band)), taken, band[:, taken].contiguous()))
    return found


def lanczos(size: int, side: int) -> Float[np.ndarray, "side size"]:
    """Weights of a line's pixels in each pixel of the resized line.

    Pixels are half a pixel from their edges; where the line shrinks, the kernel widens.
    """
    scale = size / side
    centres = (np.arange(side) + 0.5) * scale
    x = (np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.where(np.abs(x) < LOBES, np.sinc(x) * np.sinc(x / LOBES), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
