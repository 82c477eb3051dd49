"""Files of an evaluation: chains as they finish, and results.json, complete or not there."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from defi.config import typed
from defi.engine.output import write_file
from defi.errors import UserError, one_line
from Step3_DeFI.rollout.messages import ChainResult
from Step3_DeFI.rollout.protocol import Protocol
from Step3_DeFI.rollout.statistics import summarise

FORMAT = 1
RESULTS = "results.json"
PACKAGES = ("defi-robot", "torch", "numpy", "pybullet", "diffusers", "transformers")


class ChainLog:
    """Finished chains, one JSON line each, flushed to the disk as they come.

    Processes on other devices write files of their own (`<name>.<rank>.jsonl`); all are read.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0) -> None:
        self.folder, self.name = folder, name
        self.path = folder / (f"{name}.{rank}.jsonl" if rank else f"{name}.jsonl")

    def read(self) -> dict[int, ChainResult]:
        """All finished chains by index. A last line that was cut off by a kill is left out.

        Raises:
            UserError: a line is damaged.
        """
        found = {}
        for path in sorted(self.folder.glob(f"{self.name}*.jsonl")):
            lines = path.read_text(errors="replace").split("\n")[:-1]
            for number, line in enumerate(lines, start=1):
                try:
                    chain = chain_from_json(json.loads(line))
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise UserError(f"{path}: line {number} is no chain; delete that line") from None
                found[chain.index] = chain
        return found

    def clear(self) -> None:
        """Forget all chains."""
        for path in self.folder.glob(f"{self.name}*.jsonl"):
            path.unlink()

    def append(self, chain: ChainResult) -> None:
        with self.path.open("a+b") as file:
            _drop_cut_line(file)
            file.write(json.dumps(asdict(chain)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _drop_cut_line(file: Any) -> None:
    """Remove what follows the last line break."""
    file.seek(0)
    text = file.read()
    file.truncate(text.rfind(b"\n") + 1)


def chain_from_json(values: Mapping[str, Any]) -> ChainResult:
    """Raises ValueError, TypeError or KeyError for what is no chain."""
    chain = ChainResult(**values | {"tasks": tuple(values["tasks"]), "steps": tuple(values["steps"])})
    numbers = (chain.index, chain.control_steps, chain.looks, *(n for n in chain.steps if n is not None))
    if not (
        all(isinstance(number, int) for number in numbers)
        and isinstance(chain.seconds, (int, float))
        and all(isinstance(task, str) for task in chain.tasks)
    ):
        raise TypeError(f"not a chain: {values}")
    return chain


@dataclass(frozen=True)
class Results:
    """A finished evaluation.

    Args:
        policy: kind, and for a checkpoint its path, fingerprint, step.
        protocol: what must agree for two numbers to be comparable.
        run: when, how long, on what, with which settings and versions.
        limits: per limit of control steps ("360") the summary of `statistics.summarise`.
        chains: every chain, in order.
        baseline: the same of the run beside it: {"agent", "limits", "chains"}.
    """

    policy: Mapping[str, Any]
    protocol: Mapping[str, Any]
    run: Mapping[str, Any]
    limits: Mapping[str, Mapping[str, Any]]
    chains: tuple[ChainResult, ...]
    baseline: Mapping[str, Any] | None = None
    format: int = FORMAT

    def save(self, path: Path) -> None:
        write_file(path, json.dumps(asdict(self), indent=1))


def summaries(chains: Sequence[ChainResult], max_steps: Sequence[int]) -> dict[str, dict[str, Any]]:
    return {str(limit): summarise(chains, limit) for limit in max_steps}


def read_results(path: Path | str) -> Results:
    """Results from a results.json or the folder it is in.

    Raises:
        UserError: nothing there, or something else.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        unfinished = path.is_dir() and any(path.glob("chains*.jsonl"))
        reason = (
            "unfinished; continue it with resume=true" if unfinished else "give an output folder of a rollout"
        )
        raise UserError(f"{file}: no such file; {reason}")
    try:
        values = json.loads(file.read_text())
        if values.get("format") != FORMAT:
            raise UserError(
                f"{file}: format {values.get('format')}, this version reads {FORMAT}; evaluate again"
            )
        protocol = asdict(typed(Protocol, values["protocol"], f"{file}: protocol"))
        _demand_readable(values, protocol["max_steps"])
        chains = tuple(map(chain_from_json, values["chains"]))
        return Results(**values | {"protocol": protocol, "chains": chains})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a rollout's results ({one_line(error)}); evaluate again") from None


def _demand_readable(values: Mapping[str, Any], max_steps: Sequence[int]) -> None:
    """Raises ValueError or KeyError where a results.json lacks what a comparison or a report reads."""
    run, policy = values["run"], values["policy"]
    averages = [values["limits"][str(limit)]["average"] for limit in max_steps]
    if not (
        values["chains"]
        and all(isinstance(average, (int, float)) for average in averages)
        and all(isinstance(part, dict) for part in (run["settings"], run["versions"], policy))
    ):
        raise ValueError("chains, averages or settings are missing")


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
