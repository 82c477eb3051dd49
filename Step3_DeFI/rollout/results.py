"""What an evaluation says: episodes as they finish, and results.json."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from defi.benchmarks.benchmark import About, Outcome
from defi.benchmarks.find import FIRST, find_benchmark
from defi.benchmarks.statistics import Summary
from defi.config import typed
from defi.engine.output import write_file
from defi.errors import UserError, reading
from Step3_DeFI.rollout.simulator import EpisodeResult

FORMAT = 1
IDENTITY, RESULTS = "rollout.json", "results.json"
PACKAGES = ("defi-robot", "torch", "numpy", "pybullet", "sapien", "diffusers", "transformers")

# Settings that finished episodes do not depend on.
HOWEVER_DONE = {"benchmark", "processes", "videos", "baseline", "output", "resume", "overwrite"}
HOWEVER_DONE |= {"checkpoint", "gfdm", "gidm", "threads"}  # hashes and threads as resolved are known


def running_average(values: Iterable[float], about: About) -> str:
    """Mean and 95 % interval, by the normal approximation: for the screen, while episodes finish."""
    found = np.array(list(values), dtype=np.float64)
    half = f" ± {1.96 * found.std(ddof=1) / np.sqrt(len(found)):.2f}" if len(found) > 1 else ""
    return f"{about.figure} {found.mean():.2f}{half}"


class EpisodeLog:
    """Finished episodes, one JSON line each, flushed to the disk as they come.

    Processes on other devices write files of their own (`<name>.<rank>.jsonl`); all are read.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0) -> None:
        self.folder, self.name = folder, name
        self.path = folder / (f"{name}.{rank}.jsonl" if rank else f"{name}.jsonl")

    def read(self, check: Callable[[Outcome], object] = lambda _: None) -> dict[int, EpisodeResult]:
        """All finished episodes by index. A last line that a kill left unfinished is left out.

        check: raises an error for what is no outcome of the benchmark.
        """
        found = {}
        for path in sorted(self.folder.glob(f"{self.name}*.jsonl")):
            lines = path.read_text(errors="replace").split("\n")[:-1]
            for number, line in enumerate(lines, start=1):
                with reading(f"{path}: line {number}", "delete that line"):
                    episode = from_json(json.loads(line))
                    check(episode.outcome)
                found[episode.index] = episode
        return found

    def append(self, episode: EpisodeResult) -> None:
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # without what a kill left of a line
            file.write(json.dumps(to_json(episode)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def to_json(episode: EpisodeResult) -> dict[str, Any]:
    """The outcome's entries beside the others."""
    values = asdict(episode)
    return {"index": values.pop("index"), **values.pop("outcome"), **values}


def from_json(values: dict[str, Any]) -> EpisodeResult:
    """Raises ValueError, TypeError or KeyError for what is no episode."""
    if "looks" in values:  # what the first version called them
        values = values | {"observations": values.pop("looks")}
    counts = {key: values.pop(key) for key in ("index", "control_steps", "observations")}
    seconds = float(values.pop("seconds"))
    if not all(isinstance(count, int) for count in counts.values()):
        raise TypeError("not an episode")
    return EpisodeResult(outcome=values, seconds=seconds, **counts)


@dataclass(frozen=True)
class Results:
    """A finished evaluation."""

    about: About
    policy: Mapping[str, Any]  # kind, and for a checkpoint its path, fingerprint, step
    protocol: Mapping[str, Any]  # what must agree for two numbers to be comparable
    run: Mapping[str, Any]  # when, how long, on what, with which settings and versions
    episodes: tuple[EpisodeResult, ...]  # all, in order
    scores: dict[str, Summary]  # in the order of the tables; the last is the headline
    baseline: Mapping[str, Any] | None = None  # of the run beside it: {"agent", "scores", "episodes"}

    @property
    def headline(self) -> str:
        """Name of the score that counts."""
        return list(self.scores)[-1]

    def save(self, path: Path) -> None:
        about, baseline = self.about, self.baseline
        if baseline:
            lists = {about.scores: baseline["scores"], about.episodes: baseline["episodes"]}
            baseline = {"agent": baseline["agent"], **lists}
        values = {"format": FORMAT, "policy": self.policy, "protocol": self.protocol, "run": self.run}
        values |= {about.episodes: list(map(to_json, self.episodes)), "baseline": baseline}
        values |= {about.scores: self.scores, "benchmark": asdict(about)}
        write_file(path, json.dumps(values, indent=1))


def read_results(path: Path | str) -> Results:
    """Results from a results.json or the folder it is in; nothing that they name is imported.

    Raises:
        UserError: nothing there, or something else.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file() and (path / IDENTITY).is_file():
        raise UserError(f"{file}: missing, the rollout is unfinished; continue it with resume=true")
    with reading(file, "give the output folder of a finished rollout"):
        values = json.loads(file.read_text())
        if values.get("format") != FORMAT:
            raise ValueError(f"format {values.get('format')}, this version reads {FORMAT}")
        policy, protocol, run = values["policy"], values["protocol"], values["run"]
        parts = (policy, protocol, run["settings"], run["versions"])
        if not all(isinstance(part, dict) for part in parts) or not isinstance(policy["kind"], str):
            raise ValueError("settings are missing")
        if "benchmark" not in values:
            first: Any = find_benchmark(FIRST)()
            values = first.complete(values)
        about = typed(About, values["benchmark"], "benchmark")
        episodes = tuple(map(from_json, values[about.episodes]))
        scores, baseline = values[about.scores], values["baseline"]
        if baseline is not None:
            lists = {"scores": baseline[about.scores], "episodes": baseline[about.episodes]}
            baseline = {"agent": str(baseline["agent"]), **lists}
            check_scores(baseline["scores"], about)
        check_scores(scores, about)
        if len(episodes) != protocol.get(about.episodes, len(episodes)) or not scores:
            raise ValueError(f"{about.episodes} are missing")
        if any(len(summary["values"]) != len(episodes) for summary in scores.values()):
            raise ValueError("values are missing")
        return Results(about, policy, protocol, run, episodes, scores, baseline)


def check_scores(scores: Mapping[str, Summary], about: About) -> None:
    """Raises ValueError, TypeError or KeyError for what cannot be shown."""
    for summary in scores.values():
        rates = [(summary["average"], summary["interval"])]
        rates += [(rate["rate"], rate["interval"]) for rate in summary["success"]]
        numbers = [number for rate, (low, high) in rates for number in (rate, low, high)]
        counts = [number for task in summary["tasks"].values() for number in (task["solved"], task["tried"])]
        if not all(isinstance(number, (int, float)) for number in (*numbers, *counts, *summary["values"])):
            raise TypeError("not a number")
        if len(rates) != 1 + len(about.columns) or not all(counts[1::2]):
            raise ValueError("rates are missing")


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:  # the first on the path of each, whatever else lies there
        installed = importlib.metadata.distributions(name=package)
        found[package] = next((each.version for each in installed), "not installed")
    return found
