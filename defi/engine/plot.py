"""Curves of training runs from their `metrics.jsonl`: `python -m defi.engine.plot <run> [<run> …]`."""

import argparse
from collections.abc import Sequence
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
from defi.engine.log import METRICS, read_metrics
from defi.errors import UserError

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # <kind>/<name> → steps, values
BOOKKEEPING = ("kind", "step", "epoch", "elapsed_s", "usual")
LAST = ("lr", "grad_norm", "samples_per_s", "data_wait")  # of the panels
TITLES = {"lr": "learning rate", "samples_per_s": "samples per second", "data_wait": "time waiting for data"}
SHARES = ("data_wait", "code_usage")
MARKS = {"epoch": "s", "preview": "o", "evaluate": "D", "spike": "x"}
SMOOTHED = 100  # points from which on a running mean is drawn
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 10, "font.size": 9, "lines.linewidth": 1.4, "lines.markersize": 4,
    "legend.frameon": False,
}  # fmt: skip


def curves(path: Path | str) -> Curves:
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


def _records(path: Path | str) -> list[dict[str, Any]]:
    return read_metrics(Path(path, METRICS) if Path(path).is_dir() else Path(path))


def draw(runs: Sequence[Path], out: Path) -> Path:
    """Draw the curves of the runs into a PNG file: a panel per number, a colour per run.

    Training is a line, everything else points; vertical lines mark steps that were left out.

    Raises:
        UserError: a run has no numbers, or the picture cannot be written.
    """
    by_run = {str(run.parent if run.name == METRICS else run): curves(run) for run in runs}
    left_out = [[r["step"] for r in _records(run) if r["kind"] == "left_out"] for run in runs]
    numbers = {name.partition("/")[2] for found in by_run.values() for name in found}
    if not numbers:
        raise UserError(
            f"{runs[0]}: {METRICS} holds no numbers yet; wait for the first trainer.log_every steps"
        )
    last = max(steps[-1] for found in by_run.values() for steps, _ in found.values())
    columns = min(3, len(numbers))
    rows = -(-len(numbers) // columns)
    size = (4.6 * columns, 2.6 * rows + 0.5)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, number in zip(axes.flat, sorted(numbers, key=_rank)):
            for color, found in enumerate(by_run.values()):
                for name, (steps, values) in found.items():
                    kind, _, of = name.partition("/")
                    if of == number:
                        _draw_curve(axis, kind, steps, values, f"C{color}", smooth=number != "lr")
                for step in left_out[color]:
                    axis.axvline(step, color=f"C{color}", linewidth=0.8, linestyle=":")
            _finish(axis, number, last)
        for axis in axes.flat[len(numbers) :]:
            axis.remove()
        handles = [Line2D([], [], color=f"C{color}", label=run) for color, run in enumerate(by_run)]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=9)
        try:
            figure.savefig(out, dpi=110)
        except OSError as error:
            raise UserError(
                f"{out}: cannot be written ({error.strerror}); free space or choose another --out"
            ) from None
        finally:
            plt.close(figure)
    return out


def _rank(number: str) -> tuple[int, str]:
    """Order of the panels: losses first, the machinery last."""
    return (0 if number == "loss" else 1 if number.endswith("loss") else 3 if number in LAST else 2, number)


def _draw_curve(
    axis: Axes, kind: str, steps: np.ndarray, values: np.ndarray, color: str, *, smooth: bool
) -> None:
    """Training as a line, faint under its running mean where there are many points; the rest as points."""
    if kind != "train":
        style = MARKS.get(kind, "o") + ("" if kind == "spike" else "-")
        label = None if kind in axis.get_legend_handles_labels()[1] else kind
        axis.plot(steps, values, style, color=color, linewidth=0.6, label=label)
        return
    smooth = smooth and len(steps) >= SMOOTHED
    axis.plot(steps, values, color=color, alpha=0.25 if smooth else 1, marker="" if len(steps) > 1 else ".")
    if smooth:
        axis.plot(steps, running_mean(values, len(steps) // 50), color=color)


def running_mean(values: Float[np.ndarray, " N"], reach: int) -> Float[np.ndarray, " N"]:
    """Mean of each value and as many as `reach` before and after it."""
    ones = np.ones(2 * reach + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _finish(axis: Axes, number: str, last: float) -> None:
    """Title, scales, and which marks are which."""
    axis.set_title(TITLES.get(number, number.replace("_", " ")), loc="left")
    axis.set_xlim(0, last)
    low, high = axis.dataLim.intervaly
    if number.endswith("loss") and low > 0 and high > 5 * low:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(NullLocator())
    elif number in SHARES:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if number in (*SHARES, "lr", "samples_per_s"):
        axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8)


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
