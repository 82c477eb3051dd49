"""What a file holds against what a model expects: each tensor loaded, left over for a reason, or an error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from defi.errors import UserError

Shape = tuple[int, ...]


@dataclass
class LoadingReport:
    """What becomes of each tensor of the file `source`. Names are those of the file.

    loaded: taken over, with their shapes. left_over: not needed, by the reason.
    missing: expected and not there. misshapen: found and expected shape. unknown: no use is known.
    """

    source: str
    loaded: dict[str, Shape] = field(default_factory=dict)
    left_over: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, Shape] = field(default_factory=dict)
    misshapen: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def check(self) -> "LoadingReport":
        """Itself, if every tensor has a place.

        Raises:
            DoesNotFit: names the file, the first tensor that does not fit, its expected shape, and how many.
        """
        if self.misshapen:
            name, (found, wanted) = next(iter(self.misshapen.items()))
            fault = f"{name} has shape {found}, expected {wanted} ({len(self.misshapen)} such)"
            fix = "choose the preset that it fits (python -m defi.checkpoints.inspect)"
        elif self.missing:
            name, wanted = next(iter(self.missing.items()))
            fault = f"{name} of shape {wanted} is missing ({len(self.missing)} such)"
            fix = "give the complete checkpoint of this stage"
        elif self.unknown:
            fault = f"{self.unknown[0]} is not of this model ({len(self.unknown)} such)"
            fix = "give the checkpoint of this stage"
        else:
            return self
        raise DoesNotFit(self, f"{self.source}: {fault}; {fix}")

    def table(self) -> Table:
        """For the terminal: parts loaded, what is missing, what is left over and why."""
        table = Table(title=escape(self.source), title_justify="left", box=None, pad_edge=False)
        for column in ("", "tensors", "parameters", "what"):
            table.add_column(column, justify="right" if column in ("tensors", "parameters") else "left")
        parts: dict[str, list[int]] = {}
        for name, shape in self.loaded.items():
            parts.setdefault(part_of(name), []).append(math.prod(shape))
        rows = [("loaded", len(sizes), f"{sum(sizes):,}", part) for part, sizes in parts.items()]
        rows += [
            ("left over", len(names), "", f"{in_common(names)}: {why}")
            for why, names in self.left_over.items()
        ]
        rows += [
            ("[red]wrong shape[/]", 1, "", f"{name}: {found}, expected {wanted}")
            for name, (found, wanted) in self.misshapen.items()
        ]
        rows += [
            ("[red]missing[/]", 1, f"{math.prod(shape):,}", f"{name} {shape}")
            for name, shape in self.missing.items()
        ]
        rows += [("[red]unknown[/]", 1, "", name) for name in self.unknown]
        for kind, count, parameters, what in rows:
            table.add_row(kind, f"{count:,}", parameters, escape(what))
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
    for name, tensor in tensors.items():
        found = tuple(tensor.shape)
        if name in expected:
            wanted = tuple(expected[name].shape)
            if found == wanted:
                report.loaded[name] = found
            else:
                report.misshapen[name] = (found, wanted)
        elif reason := next((why for start, why in (unneeded or {}).items() if name.startswith(start)), None):
            report.left_over.setdefault(reason, []).append(name)
        else:
            report.unknown.append(name)
    report.missing = {name: tuple(t.shape) for name, t in expected.items() if name not in tensors}
    return report


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to: its name's first two parts, less where it has fewer."""
    parts = name.split(".")
    return ".".join(parts[: min(2, max(1, len(parts) - 1))])


def in_common(names: Sequence[str]) -> str:
    """What names have in common, for people: the name itself, or their beginning and an ellipsis."""
    if len(names) == 1:
        return names[0]
    shared = []
    for column in zip(*(name.split(".") for name in names)):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join([*shared, "…"])
