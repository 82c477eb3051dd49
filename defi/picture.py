"""Encoded pictures, JPEG and PNG, whoever wrote them."""

import io

import numpy as np
import torch
import torchvision
from jaxtyping import UInt8
from PIL import Image

from defi.errors import one_line

FORMATS = ("JPEG", "PNG")  # others may call programs or are read by code that is less tried


def decode_picture(coded: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a picture, colours without transparency; of 16 bits the upper eight.

    Raises:
        ValueError: it is damaged, of another format, or so large that it would fill the memory.
    """
    try:
        with Image.open(io.BytesIO(coded), formats=FORMATS) as picture:  # reads the header; not huge
            if picture.format == "PNG":  # torchvision would crash on a damaged one, and is no faster
                if picture.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip at 255
                    return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
                return np.asarray(picture.convert("RGB"))
        pixels = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
        decoded = torchvision.io.decode_jpeg(pixels, torchvision.io.ImageReadMode.RGB)
        return decoded.permute(1, 2, 0).numpy()
    except Image.UnidentifiedImageError:
        raise ValueError(f"neither {' nor '.join(FORMATS)}") from None
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(one_line(error)) from None
