"""Tensor names of two implementations of one network, one table for both directions."""

import functools
import re
from collections.abc import Mapping

import torch
from torch import Tensor


class Names:
    """A table from names to the names of the parts that each tensor is made of.

    A name stands for everything below it, and `*` for a layer number. Most tensors are one part; a fused
    projection is several (q, k, v), stacked along the first dimension. What the table does not name is left
    out: whoever loads the result compares it with what the model expects.
    """

    def __init__(self, table: Mapping[str, str | tuple[str, ...]]) -> None:
        self._table = {name: (of,) if isinstance(of, str) else of for name, of in table.items()}

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the table's names → their parts."""
        return {
            _fill(part, match): piece
            for name, tensor in tensors.items()
            for whole, parts in self._table.items()
            if (match := _pattern(whole).fullmatch(name))
            for part, piece in zip(parts, tensor.chunk(len(parts)))
        }

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts → tensors under the table's names; one of which parts are missing is left out."""
        places = [
            (_pattern(p), whole, i, len(of)) for whole, of in self._table.items() for i, p in enumerate(of)
        ]
        found: dict[str, list[Tensor | None]] = {}
        for name, tensor in tensors.items():
            for pattern, whole, i, count in places:
                if match := pattern.fullmatch(name):
                    found.setdefault(_fill(whole, match), [None] * count)[i] = tensor
        complete = {name: parts for name, parts in found.items() if not any(part is None for part in parts)}
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in complete.items()}


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"(\d+)") + r"((?:\..+)?)")


def _fill(name: str, match: re.Match[str]) -> str:
    *numbers, below = match.groups()
    for number in numbers:
        name = name.replace("*", number, 1)
    return name + below


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with `prefix` before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}
