"""Pictures at the size that the model sees, as the published code resizes them: Lanczos3 with antialias.

No library that the stages need anyway has this filter for floats at a loader's speed: Pillow's rounds to
bytes between its two passes (up to 7 levels off), its float mode takes three times as long.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

LOBES = 3  # of the kernel sinc(x) sinc(x/3), on either side
BAND = 32  # rows of a matrix that are multiplied at once: its rest, mostly zeros, is left out
Band = tuple[slice, slice, Float[Tensor, "b k"]]


def resize(frames: UInt8[Tensor, "N 3 H W"], side: int) -> Float[Tensor, "N 3 side side"]:
    """The whole picture at side × side, whatever its shape was; values in [0, 1]."""
    return to_unit(lanczos(frames, side))


def lanczos(frames: UInt8[Tensor, "N 3 H W"], side: int) -> UInt8[Tensor, "N 3 side side"]:
    """The same in bytes: half-pixel centres, the kernel widened where the picture shrinks, then rounded."""
    n, _, height, width = frames.shape
    rows = frames.permute(0, 2, 3, 1).float().reshape(n, height, width * 3)  # as decoders give them
    tall = rows.new_empty(n, side, width * 3)
    for out, taken, weights in bands(height, side):
        tall[:, out] = weights @ rows[:, taken]
    lines = tall.view(n, side, width, 3).permute(0, 3, 1, 2).reshape(-1, width)
    small = lines.new_empty(len(lines), side)
    for out, taken, weights in bands(width, side):
        small[:, out] = lines[:, taken] @ weights.T
    return small.round_().clamp_(0, 255).byte().view(n, 3, side, side)


def to_unit(frames: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Bytes to [0, 1]."""
    return frames.float().div_(255)


@lru_cache(maxsize=64)
def bands(size: int, side: int) -> list[Band]:
    """The matrix [side, size] that resizes a line, band by band: its rows, the columns they need, weights."""
    matrix, found = torch.from_numpy(lanczos_matrix(size, side)), []
    for first in range(0, side, BAND):
        band = matrix[first : first + BAND]
        columns = band.any(0).nonzero()
        taken = slice(int(columns[0]), int(columns[-1]) + 1)
        found.append((slice(first, first + len(band)), taken, band[:, taken].contiguous()))
    return found


def lanczos_matrix(size: int, side: int) -> Float[np.ndarray, "side size"]:
    """Each row: the weights of a line's pixels in one pixel of the resized line."""
    scale = size / side
    centres = (np.arange(side) + 0.5) * scale
    x = (np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.where(np.abs(x) < LOBES, np.sinc(x) * np.sinc(x / LOBES), 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
