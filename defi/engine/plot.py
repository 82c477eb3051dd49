"""Curves of training runs from their `metrics.jsonl`: `python -m defi.engine.plot <run> [<run> …]`."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator, PercentFormatter

from defi.config import one_line_errors
from defi.engine.tracking import METRICS, read_metrics
from defi.errors import UserError

Curve = tuple[np.ndarray, np.ndarray]  # steps, values
BOOKKEEPING = ("kind", "step", "epoch", "elapsed_s", "usual")
MACHINERY = ("lr", "grad_norm", "samples_per_s", "data_wait")
TITLES = {
    "lr": "learning rate",
    "samples_per_s": "samples per second",
    "data_wait": "time waiting for data",
}
SHARES = ("data_wait", "code_usage")
FROM_ZERO = (*SHARES, "lr", "samples_per_s")
MARKS = {"epoch": "s", "sample": "o", "evaluate": "D", "spike": "x"}
SMOOTHED = 100  # points from which on a running mean is drawn
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 10, "font.size": 9, "lines.linewidth": 1.4, "lines.markersize": 4,
    "legend.frameon": False,
}  # fmt: skip


def curves(path: Path | str) -> dict[str, Curve]:
    """Every number of a run as (steps, values), under `<kind>/<name>`, such as `train/loss`.

    Args:
        path: a run's output folder or its metrics.jsonl.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for record in _records(path):
        for name, value in record.items():
            if name not in BOOKKEEPING and isinstance(value, int | float):
                points.setdefault(f"{record['kind']}/{name}", []).append((record["step"], value))
    return {name: tuple(np.array(pairs, dtype=float).T) for name, pairs in points.items()}


def steps_of(path: Path | str, kind: str) -> list[int]:
    """The steps of a run's lines of one kind."""
    return [record["step"] for record in _records(path) if record["kind"] == kind]


def _records(path: Path | str) -> list[dict[str, Any]]:
    path = Path(path)
    return read_metrics(path / METRICS if path.is_dir() else path)


def panels(names: Iterable[str]) -> dict[str, list[str]]:
    """Curves that are the same number seen in training, at epochs, in samples, together; losses first."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition("/")[2], []).append(name)
    return {name: found[name] for name in sorted(found, key=lambda name: (_rank(name), name))}


def _rank(name: str) -> int:
    if name == "loss":
        return 0
    return 1 if name.endswith("loss") else 3 if name in MACHINERY else 2


def draw(runs: Sequence[Path], out: Path) -> Path:
    """Draw the curves of the runs into a PNG file: a panel per number, a colour per run.

    Training is a line, everything else points; vertical lines mark steps that were left out.

    Raises:
        UserError: a run has no numbers, or the picture cannot be written.
    """
    by_run = {_title(run): curves(run) for run in runs}
    left_out = {_title(run): steps_of(run, "left_out") for run in runs}
    shown = panels(dict.fromkeys(name for found in by_run.values() for name in found))
    if not shown:
        raise UserError(
            f"{runs[0]}: {METRICS} holds no numbers yet; wait for the first trainer.log_every steps"
        )
    last = max(steps[-1] for found in by_run.values() for steps, _ in found.values())
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.6 * columns, 2.6 * rows + 0.5), squeeze=False, layout="constrained"
        )
        for axis, (name, kinds) in zip(axes.flat, shown.items()):
            for number, (run, found) in enumerate(by_run.items()):
                for kind in kinds:
                    if kind in found:
                        _draw_curve(axis, kind, found[kind], f"C{number}")
                for step in left_out[run]:
                    axis.axvline(step, color=f"C{number}", linewidth=0.8, linestyle=":")
            _finish(axis, name, kinds, last)
        for axis in axes.flat[len(shown) :]:
            axis.remove()
        marks = [Line2D([], [], color=f"C{number}", label=run) for number, run in enumerate(by_run)]
        figure.legend(handles=marks, loc="outside upper left", ncols=len(marks), fontsize=9)
        try:
            figure.savefig(out, dpi=110)
        except OSError as error:
            raise UserError(
                f"{out}: cannot be written ({error.strerror}); make room there or choose another --out"
            ) from None
        finally:
            plt.close(figure)
    return out


def _title(run: Path) -> str:
    return str(run.parent if run.name == METRICS else run)


def _draw_curve(axis: Axes, name: str, curve: Curve, color: str) -> None:
    """Training as it is, where that is ragged faint under its running mean; anything else as points."""
    steps, values = curve
    kind, _, number = name.partition("/")
    if kind != "train":
        axis.plot(steps, values, MARKS.get(kind, "o"), color=color)
        if kind != "spike":
            axis.plot(steps, values, color=color, linewidth=0.6)
        return
    smooth = len(steps) >= SMOOTHED and number != "lr"
    axis.plot(steps, values, color=color, alpha=0.25 if smooth else 1, marker="" if len(steps) > 1 else ".")
    if smooth:
        axis.plot(steps, running_mean(values, len(steps) // 50), color=color)


def running_mean(values: Float[np.ndarray, " N"], reach: int) -> Float[np.ndarray, " N"]:
    """Mean of each value and as many as `reach` before and after it."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    place = np.arange(len(values))
    first, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _finish(axis: Axes, name: str, kinds: Sequence[str], last: float) -> None:
    """Title, scales, and which marks are which."""
    axis.set_title(TITLES.get(name, name.replace("_", " ")), loc="left")
    axis.set_xlim(0, last)
    values = np.concatenate([line.get_ydata() for line in axis.lines if len(line.get_xdata()) != 2] or [[1]])
    if name.endswith("loss") and values.min() > 0 and values.max() > 5 * values.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(NullLocator())
    elif name in SHARES:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if name in FROM_ZERO:
        axis.set_ylim(bottom=0)
    if len(kinds) > 1:
        marks = [
            Line2D([], [], color="0.4", marker=MARKS.get(kind, "o"), linestyle="", label=kind)
            for kind in (name.partition("/")[0] for name in kinds)
            if kind != "train"
        ]
        axis.legend(handles=marks, fontsize=8)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m defi.engine.plot", description="Draw curves of training runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of training runs")
    parser.add_argument("--out", type=Path, help="picture to write (default: curves.png in the first run)")
    options = parser.parse_args()
    with one_line_errors():
        print(draw(options.runs, options.out or options.runs[0] / "curves.png"))


if __name__ == "__main__":
    main()
