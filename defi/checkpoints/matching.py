"""Tensors of a file and of a model: their names in both, and what becomes of each.

Each tensor of a file is loaded, left over for a reason, or an error.
"""

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from defi.errors import UserError

Shape = tuple[int, ...]
FAULTS = {
    "wrong shape": (
        "{} has shape {}, expected {}",
        "choose the preset that it fits (python -m defi.checkpoints.inspect)",
    ),
    "missing": ("{0} of shape {2} is missing", "give the complete checkpoint of this stage"),
    "unknown": ("{0} is not of this model", "give the checkpoint of this stage"),
}
"""Kind of fault: what is said of a tensor (its name, found and expected shape), and what to do."""


@dataclass
class LoadingReport:
    """What becomes of each tensor of the file `source`. Names are those of the file.

    loaded: taken over, with their shapes. left_over: not needed, by the reason. faults: what does not fit, as
    the kind (of `FAULTS`), the name, the found and the expected shape.
    """

    source: str
    loaded: dict[str, Shape] = field(default_factory=dict)
    left_over: dict[str, list[str]] = field(default_factory=dict)
    faults: list[tuple[str, str, Shape | None, Shape | None]] = field(default_factory=list)

    def check(self) -> "LoadingReport":
        """Itself, if every tensor has a place.

        Raises:
            DoesNotFit: names the file, the first tensor that does not fit, its expected shape, and how many.
        """
        for kind, (text, fix) in FAULTS.items():
            if found := [tensor for fault, *tensor in self.faults if fault == kind]:
                raise DoesNotFit(self, f"{self.source}: {text.format(*found[0])} ({len(found)} such); {fix}")
        return self

    def table(self) -> Table:
        """For the terminal: parts loaded, what is left over and why, what does not fit."""
        table = Table(title=escape(self.source), title_justify="left", box=None, pad_edge=False)
        for column in ("", "tensors", "parameters", "what"):
            table.add_column(column, justify="right" if column in ("tensors", "parameters") else "left")
        parts: dict[str, list[int]] = {}
        for name, shape in self.loaded.items():
            parts.setdefault(part_of(name), []).append(math.prod(shape))
        for part, sizes in parts.items():
            table.add_row("loaded", f"{len(sizes):,}", f"{sum(sizes):,}", escape(part))
        for why, names in self.left_over.items():
            table.add_row("left over", f"{len(names):,}", "", escape(f"{in_common(names)}: {why}"))
        for kind, *tensor in self.faults:
            size = f"{math.prod(tensor[2]):,}" if kind == "missing" else ""
            table.add_row(f"[red]{kind}[/]", "1", size, escape(FAULTS[kind][0].format(*tensor)))
        return table


class DoesNotFit(UserError):
    """A file does not hold exactly what is expected of it; `report` lists all that does not fit."""

    def __init__(self, report: LoadingReport, message: str) -> None:
        super().__init__(message)
        self.report = report


def compare(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    source: object,
    unneeded: Mapping[str, str] | None = None,
) -> LoadingReport:
    """Compare what a file holds with what is expected of it, both by the file's names.

    unneeded: reasons by name or beginning of a name ("lam.decoder."), for tensors that a model does without.
    """
    report = LoadingReport(str(source))
    for name in {**tensors, **expected}:
        found, wanted = (tuple(side[name].shape) if name in side else None for side in (tensors, expected))
        reason = next((why for start, why in (unneeded or {}).items() if name.startswith(start)), None)
        if found == wanted:
            report.loaded[name] = found
        elif wanted is None and reason:
            report.left_over.setdefault(reason, []).append(name)
        else:
            kind = "missing" if found is None else "unknown" if wanted is None else "wrong shape"
            report.faults.append((kind, name, found, wanted))
    return report


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to: its name's first two parts, less where it has fewer."""
    parts = name.split(".")
    return ".".join(parts[:-1][:2] or parts)


def in_common(names: Sequence[str]) -> str:
    """What names have in common, for people: the name itself, or their beginning and an ellipsis."""
    shared = os.path.commonprefix([name.split(".") for name in names])
    return names[0] if len(names) == 1 else ".".join([*shared, "…"])


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
