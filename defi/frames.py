"""Frames of a recording as one array."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError


def stack_frames(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]], places: Sequence[object]
) -> UInt8[np.ndarray, "F H W 3"]:
    """One array of all frames. places: where each of them is, for errors.

    Raises:
        UserError: they are not all of one size.
    """
    for frame, place in zip(frames, places):
        if frame.shape != frames[0].shape:
            before, after = (" x ".join(map(str, each.shape[:2])) for each in (frames[0], frame))
            raise UserError(
                f"{place}: the pictures change their size here, from {before} to {after} (height x width); "
                "bring those of a recording to one size, or leave it out"
            )
    return np.stack(frames)
