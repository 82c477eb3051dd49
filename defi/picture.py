"""Encoded pictures, JPEG and PNG, whoever wrote them, and the pictures of a recording as one array."""

import io
from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from jaxtyping import UInt8
from PIL import Image

from defi.errors import UserError, reading

FORMATS = ("JPEG", "PNG")  # others may call programs or are read by code that is less tried


def decode_picture(
    coded: bytes, where: str, *, most: int | None = None, fix: str = "copy the file again"
) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a picture, colours without transparency; of 16 bits the upper eight.

    where: what it is, for errors ("<file>: picture 3"). most: bytes of pixels that it may have.
        fix: what to do about damage.

    Raises:
        UserError: it is damaged, of another format, or so large that it would fill the memory.
    """
    with reading(where, fix):
        try:
            picture = Image.open(io.BytesIO(coded), formats=FORMATS)  # reads the header; not huge
        except Image.UnidentifiedImageError:
            raise ValueError(f"neither {' nor '.join(FORMATS)}") from None
        width, height = picture.size
        if most is not None and 3 * width * height > most:
            raise UserError(f"{where}: {width} x {height} pixels are too large; send it smaller")
        if picture.format == "JPEG":
            pixels = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
            decoded = torchvision.io.decode_jpeg(pixels, torchvision.io.ImageReadMode.RGB)
            return decoded.permute(1, 2, 0).numpy()
        # A PNG: torchvision would crash on a damaged one, and is no faster.
        if picture.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip at 255
            return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(picture.convert("RGB"))


def encode_picture(picture: UInt8[np.ndarray, "H W 3"], form: str) -> bytes:
    """A picture as one of `FORMATS`: PNG exactly and soon, JPEG lossily (quality 95, as TFDS writes it)."""
    buffer = io.BytesIO()
    how = {"quality": 95} if form == "JPEG" else {"compress_level": 1}
    Image.fromarray(picture).save(buffer, form, **how)
    return buffer.getvalue()


def stack_frames(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]], places: Sequence[object]
) -> UInt8[np.ndarray, "F H W 3"]:
    """One array of all frames. places: where each of them is, for errors."""
    for frame, place in zip(frames, places):
        if frame.shape != frames[0].shape:
            before, after = (" x ".join(map(str, each.shape[:2])) for each in (frames[0], frame))
            raise UserError(
                f"{place}: the pictures change their size here, from {before} to {after} (height x width); "
                "bring those of a recording to one size, or leave it out"
            )
    return np.stack(frames)
