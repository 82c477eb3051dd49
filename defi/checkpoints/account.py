"""What a file holds against what a model expects: each tensor loaded, left over for a reason, or an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from defi.errors import UserError

Shapes = Mapping[str, Sequence[int]]


@dataclass
class Report:
    """How the tensors of `source` were accounted for. Names are those of the file.

    loaded: taken over, with their shapes. spare: left over, by the reason why that is fine.
    missing: expected and not there. misshapen: there in another shape. unknown: no use is known.
    """

    source: str
    loaded: dict[str, tuple[int, ...]] = field(default_factory=dict)
    spare: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def demand(self) -> "Report":
        """Itself, if everything is accounted for.

        Raises:
            Unaccounted: names the file, the first tensor that does not fit, its expected shape, and how many.
        """
        if self.misshapen:
            name, (found, wanted) = next(iter(self.misshapen.items()))
            raise Unaccounted(
                self,
                f"{name} has shape {found}, expected {wanted} ({len(self.misshapen)} such); "
                "choose the preset that it fits (python -m defi.checkpoints.inspect)",
            )
        if self.missing:
            name, wanted = next(iter(self.missing.items()))
            raise Unaccounted(
                self,
                f"{name} of shape {wanted} is missing ({len(self.missing)} such); "
                "give the checkpoint of this stage, complete",
            )
        if self.unknown:
            raise Unaccounted(
                self,
                f"{self.unknown[0]} is not of this model ({len(self.unknown)} such); "
                "give the checkpoint of this stage",
            )
        return self

    def table(self) -> Table:
        """For the terminal: parts loaded, what is missing, what is left over and why."""
        table = Table(title=escape(self.source), title_justify="left", box=None, pad_edge=False)
        for column in ("", "tensors", "parameters", "what"):
            table.add_column(column, justify="right" if column in ("tensors", "parameters") else "left")
        parts: dict[str, list[int]] = {}
        for name, shape in self.loaded.items():
            parts.setdefault(top(name), []).append(count(shape))
        for part, counts in parts.items():
            table.add_row("loaded", f"{len(counts):,}", f"{sum(counts):,}", escape(part))
        for reason, names in self.spare.items():
            table.add_row("left over", f"{len(names):,}", "", f"{escape(common(names))}: {reason}")
        for name, (found, wanted) in self.misshapen.items():
            table.add_row("[red]wrong shape[/]", "1", "", f"{escape(name)}: {found}, expected {wanted}")
        for name, wanted in self.missing.items():
            table.add_row("[red]missing[/]", "1", f"{count(wanted):,}", f"{escape(name)} {wanted}")
        for name in self.unknown:
            table.add_row("[red]unknown[/]", "1", "", escape(name))
        return table


class Unaccounted(UserError):
    """A file does not hold exactly what is expected of it; `report` lists all that does not fit."""

    def __init__(self, report: Report, message: str) -> None:
        super().__init__(f"{report.source}: {message}")
        self.report = report


def account(
    tensors: Mapping[str, Tensor],
    expected: Shapes,
    *,
    source: object,
    spare: Mapping[str, str] | None = None,
) -> Report:
    """Compare what a file holds with what is expected of it.

    Args:
        expected: shapes by the file's names.
        spare: reasons by name or beginning of a name ("lam.decoder."), for tensors that are not needed.
    """
    report = Report(str(source))
    for name, tensor in tensors.items():
        found = tuple(tensor.shape)
        if name in expected:
            wanted = tuple(expected[name])
            if found == wanted:
                report.loaded[name] = found
            else:
                report.misshapen[name] = (found, wanted)
        elif reason := next((why for start, why in (spare or {}).items() if name.startswith(start)), None):
            report.spare.setdefault(reason, []).append(name)
        else:
            report.unknown.append(name)
    report.missing = {name: tuple(shape) for name, shape in expected.items() if name not in tensors}
    return report


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Names and shapes of tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def count(shape: Sequence[int]) -> int:
    """Elements of a tensor of this shape."""
    total = 1
    for size in shape:
        total *= size
    return total


def top(name: str) -> str:
    """The part of a model that a tensor belongs to: its name's first two parts, less where it has fewer."""
    parts = name.split(".")
    return ".".join(parts[: min(2, max(1, len(parts) - 1))])


def common(names: Sequence[str]) -> str:
    """What names have in common, for people: the name itself, or their beginning and an ellipsis."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*parts):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join([*shared, "…"])
