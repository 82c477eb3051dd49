"""What the policy sees: all cameras as one array, the same in stored data, training and rollout."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


def observe(
    images: Mapping[str, UInt8[np.ndarray, "H W 3"]], cameras: Sequence[str], size: int
) -> UInt8[Tensor, "V 3 size size"]:
    """Pictures of some cameras, in this order, of any size each → size × size, bilinear with antialiasing,
    rounded to uint8.

    In float32, as published: PyTorch's kernel for uint8 is off by one level at every tenth value.
    """
    views = []
    for camera in cameras:
        image = torch.from_numpy(np.ascontiguousarray(images[camera])).permute(2, 0, 1)[None]
        if image.shape[-2:] != (size, size):
            image = F.interpolate(image.float(), (size, size), mode="bilinear", antialias=True)
            image = image.round_().to(torch.uint8)
        views.append(image[0])
    return torch.stack(views)


def to_unit(images: UInt8[Tensor, "..."] | Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """uint8 → [-1, 1]; floats are taken to be there already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
