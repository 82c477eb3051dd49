"""What an evaluation says: chains as they finish, averages with intervals, and results.json.

A chain's length is the number of its leading tasks solved within a limit of control steps each. One run at
the largest limit holds the scores at all smaller ones: a task solved too late ends the chain there.
"""

import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy.stats import binomtest

from defi.engine.output import write_file
from defi.errors import UserError, reading
from Step3_DeFI.rollout.simulator import ChainResult

FORMAT = 1
RESULTS = "results.json"
PACKAGES = ("defi-robot", "torch", "numpy", "pybullet", "diffusers", "transformers")
DRAWS = 20_000


def lengths(chains: Iterable[ChainResult], limit: int) -> Int[np.ndarray, " N"]:
    """Of each chain the number of leading tasks solved within `limit` control steps each."""
    late = [[taken is None or taken > limit for taken in (*chain.steps, None)] for chain in chains]
    return np.array([each.index(True) for each in late], dtype=np.int64)


def mean_interval(values: Int[np.ndarray, " N"]) -> tuple[float, float]:
    """95 % interval of the mean, by the percentile bootstrap. Seeded: the same values, the same interval.

    The values are few integers, so a resample is a draw of how often each occurs (a multinomial).
    """
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=DRAWS)
    low, high = np.quantile(drawn @ distinct / len(values), [0.025, 0.975])
    return float(low), float(high)


def paired_difference(a: Int[np.ndarray, " N"], b: Int[np.ndarray, " N"]) -> dict[str, Any]:
    """Mean of b − a over the same chains, its 95 % interval, and how likely chance alone is.

    Returns:
        difference, interval; p: the share of random sign flips of the paired differences whose mean is at
        least as far from zero (two-sided permutation test); differs: whether p < 0.05.
    """
    change = b - a
    sizes, counts = np.unique(np.abs(change), return_counts=True)
    # Flipping n differences of size s at random leaves s·(2·heads − n), heads ~ Binomial(n, ½).
    heads = np.random.default_rng(0).binomial(counts, 0.5, size=(DRAWS, len(counts)))
    extreme = int((np.abs((2 * heads - counts) @ sizes) >= abs(change.sum())).sum())
    p, interval = (extreme + 1) / (DRAWS + 1), mean_interval(change)
    return {"difference": float(change.mean()), "interval": interval, "p": p, "differs": p < 0.05}


def running_average(chains: Iterable[ChainResult], limit: int) -> str:
    """Mean length and 95 % interval, by the normal approximation: for the screen, while chains finish."""
    values = lengths(chains, limit)
    half = f" ± {1.96 * values.std(ddof=1) / np.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"average length {values.mean():.2f}{half}"


def summarise(chains: Sequence[ChainResult], limit: int) -> dict[str, Any]:
    """Average length, success at each position with Wilson's interval, and counts per task, at one limit.

    A task is tried where all before it were solved.
    """
    values = lengths(chains, limit)
    reached = [binomtest(int((values > i).sum()), len(values)) for i in range(len(chains[0].tasks))]
    tried = Counter(task for chain, length in zip(chains, values) for task in chain.tasks[: length + 1])
    solved = Counter(task for chain, length in zip(chains, values) for task in chain.tasks[:length])
    return {
        "average": float(values.mean()),
        "interval": mean_interval(values),
        "success": [
            {"rate": test.statistic, "interval": list(map(float, test.proportion_ci(method="wilson")))}
            for test in reached
        ],
        "tasks": {task: {"solved": solved[task], "tried": tried[task]} for task in sorted(tried)},
    }


class ChainLog:
    """Finished chains, one JSON line each, flushed to the disk as they come.

    Processes on other devices write files of their own (`<name>.<rank>.jsonl`); all are read.
    """

    def __init__(self, folder: Path, name: str = "chains", rank: int = 0) -> None:
        self.folder, self.name = folder, name
        self.path = folder / (f"{name}.{rank}.jsonl" if rank else f"{name}.jsonl")

    def read(self) -> dict[int, ChainResult]:
        """All finished chains by index. A last line that a kill left unfinished is left out."""
        found = {}
        for path in sorted(self.folder.glob(f"{self.name}*.jsonl")):
            lines = path.read_text(errors="replace").split("\n")[:-1]
            for number, line in enumerate(lines, start=1):
                with reading(f"{path}: line {number}", "delete that line"):
                    chain = chain_from_json(json.loads(line))
                found[chain.index] = chain
        return found

    def append(self, chain: ChainResult) -> None:
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # without what a kill left of a line
            file.write(json.dumps(asdict(chain)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def chain_from_json(values: dict[str, Any]) -> ChainResult:
    """Raises ValueError, TypeError or KeyError for what is no chain."""
    if "looks" in values:  # what the first version called them
        values = values | {"observations": values.pop("looks")}
    tasks, steps, seconds = tuple(values["tasks"]), tuple(values["steps"]), float(values["seconds"])
    chain = ChainResult(**values | {"tasks": tasks, "steps": steps, "seconds": seconds})
    counts = (chain.index, chain.control_steps, chain.observations, *(taken or 0 for taken in steps))
    if not all(isinstance(n, int) for n in counts) or not all(isinstance(task, str) for task in tasks):
        raise TypeError("not a chain")
    return chain


@dataclass(frozen=True)
class Results:
    """A finished evaluation."""

    policy: Mapping[str, Any]  # kind, and for a checkpoint its path, fingerprint, step
    protocol: Mapping[str, Any]  # what must agree for two numbers to be comparable
    run: Mapping[str, Any]  # when, how long, on what, with which settings and versions
    chains: tuple[ChainResult, ...]  # all, in order
    baseline: Mapping[str, Any] | None = None  # of the run beside it: {"agent", "limits", "chains"}

    @cached_property
    def limits(self) -> dict[str, dict[str, Any]]:
        """Per limit of control steps ("360") what `summarise` says."""
        return {str(limit): summarise(self.chains, limit) for limit in self.protocol["max_steps"]}

    def save(self, path: Path) -> None:
        write_file(path, json.dumps({"format": FORMAT, **asdict(self), "limits": self.limits}, indent=1))


def read_results(path: Path | str) -> Results:
    """Results from a results.json or the folder it is in.

    Raises:
        UserError: nothing there, or something else.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file() and path.is_dir() and any(path.glob("chains*.jsonl")):
        raise UserError(f"{file}: missing, the rollout is unfinished; continue it with resume=true")
    with reading(file, "give the output folder of a finished rollout"):
        values = json.loads(file.read_text())
        if values.get("format") != FORMAT:
            raise ValueError(f"format {values.get('format')}, this version reads {FORMAT}")
        policy, protocol, run = values["policy"], values["protocol"], values["run"]
        results = Results(
            policy, protocol, run, tuple(map(chain_from_json, values["chains"])), values["baseline"]
        )
        if not all(isinstance(part, dict) for part in (policy, protocol, run["settings"], run["versions"])):
            raise ValueError("settings are missing")
        if not len(results.chains) == protocol["chains"] or not results.limits:
            raise ValueError("chains are missing")
        return results


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:  # the first on the path of each, whatever else lies there
        installed = importlib.metadata.distributions(name=package)
        found[package] = next((each.version for each in installed), "not installed")
    return found
