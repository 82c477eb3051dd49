"""Tables between the tensor names of two implementations of one network.

A table maps a name to the names of the parts that it is made of, stacked along the first dimension: most have
one part, fused projections have three (q, k, v).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Names = dict[str, tuple[str, ...]]


def both(whole: str, *parts: str) -> Names:
    """Entries for the weight and the bias of a layer."""
    return {f"{whole}.{kind}": tuple(f"{part}.{kind}" for part in parts) for kind in ("weight", "bias")}


def join(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Parts → wholes; all parts of the table must be there."""
    return {
        whole: tensors[parts[0]] if len(parts) == 1 else torch.cat([tensors[part] for part in parts])
        for whole, parts in names.items()
    }


def split(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Wholes → parts, of those that are there."""
    return {
        part: tensor
        for whole, parts in names.items()
        if whole in tensors
        for part, tensor in zip(parts, tensors[whole].chunk(len(parts)))
    }
