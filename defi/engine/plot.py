"""Curves of training runs from their `metrics.jsonl`: `python -m defi.engine.plot <run> [<run> …]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from defi.config import one_line_errors
from defi.engine.log import METRICS, read_metrics
from defi.errors import UserError
from defi.html import log_scale

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # <kind>/<name> → steps, values
BOOKKEEPING = ("kind", "step", "epoch", "elapsed_s", "usual")
LAST = ("lr", "grad_norm", "samples_per_s", "data_wait")  # of the panels
TITLES = {"lr": "learning rate", "samples_per_s": "samples per second", "data_wait": "time waiting for data"}
SHARES = ("data_wait", "code_usage")
MARKS = {"epoch": "s-", "evaluate": "D-", "spike": "x"}
SMOOTHED = 100  # points from which on a running mean is drawn
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 10, "font.size": 9, "lines.linewidth": 1.4, "lines.markersize": 4,
    "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


def curves(path: Path | str) -> Curves:
    """Every number of a run (its folder or metrics.jsonl) as (steps, values), under `<kind>/<name>`."""
    file = Path(path, METRICS) if Path(path).is_dir() else Path(path)
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(file):
        numbers = {"left_out": 1} if record["kind"] == "left_out" else record
        for name, value in numbers.items():
            if name not in BOOKKEEPING and isinstance(value, int | float):
                points.setdefault(f"{record['kind']}/{name}", []).append((record["step"], value))
    return {name: tuple(np.array(pairs, dtype=float).T) for name, pairs in points.items()}


def draw(runs: Sequence[Path]) -> Figure:
    """The curves of the runs: a panel per number, a colour per run.

    Training is a line, everything else points; vertical lines mark steps that were left out.
    """
    panels: dict[str, list[tuple[str, str, np.ndarray, np.ndarray]]] = {}
    for index, run in enumerate(runs):
        for name, (steps, values) in curves(run).items():
            kind, _, number = name.partition("/")
            panels.setdefault(number, []).append((kind, f"C{index}", steps, values))
    left_out = panels.pop("left_out", [])
    if not panels:
        fix = "wait for the first trainer.log_every steps"
        raise UserError(f"{runs[0]}: {METRICS} holds no numbers yet; {fix}")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((4.6 * columns, 2.6 * rows + 0.5), layout="constrained")
    # Losses first, the machinery last.
    order = sorted(panels, key=lambda name: (name in LAST, not name.endswith("loss"), name != "loss", name))
    for place, number in enumerate(order, start=1):
        axis = figure.add_subplot(rows, columns, place)
        for curve in panels[number]:
            _draw_curve(axis, number, *curve)
        for _, color, steps, _ in left_out:
            for step in steps:
                axis.axvline(step, color=color, linewidth=0.8, linestyle=":")
        axis.set_title(TITLES.get(number, number.replace("_", " ")), loc="left")
        low, high = axis.dataLim.intervaly
        if number.endswith("loss") and low > 0 and high > 5 * low:
            log_scale(axis)
        if number in SHARES:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        if number in (*SHARES, "lr", "samples_per_s"):
            axis.set_ylim(bottom=0)
        if axis.get_legend_handles_labels()[1]:  # which marks are which
            axis.legend(fontsize=8)
        axis.set_xlim(0, max(steps[-1] for found in panels.values() for _, _, steps, _ in found))
    names = [run.parent if run.name == METRICS else run for run in runs]
    handles = [Line2D([], [], color=f"C{color}", label=str(name)) for color, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=9)
    return figure


def _draw_curve(
    axis: Axes, number: str, kind: str, color: str, steps: np.ndarray, values: np.ndarray
) -> None:
    """Training as a line, faint under its running mean where there are many points; the rest as points."""
    if kind != "train":
        label = None if kind in axis.get_legend_handles_labels()[1] else kind
        axis.plot(steps, values, MARKS.get(kind, "o-"), color=color, linewidth=0.6, label=label)
    elif number != "lr" and len(steps) >= SMOOTHED:
        window = np.ones(2 * (len(steps) // 50) + 1)
        mean = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
        axis.plot(steps, values, color=color, alpha=0.25)
        axis.plot(steps, mean, color=color)
    else:
        axis.plot(steps, values, color=color, marker="" if len(steps) > 1 else ".")


def main() -> None:
    """Command line."""
    about = "Draw curves of training runs."
    parser = argparse.ArgumentParser(prog="python -m defi.engine.plot", description=about)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of training runs")
    parser.add_argument("--out", type=Path, help="picture to write (default: curves.png in the first run)")
    given = parser.parse_args()
    out = given.out or given.runs[0] / "curves.png"
    with one_line_errors(), matplotlib.rc_context(STYLE):
        figure = draw(given.runs)
        try:
            figure.savefig(out, dpi=110)
        except OSError as error:
            fix = "free space or choose another --out"
            raise UserError(f"{out}: cannot be written ({error.strerror}); {fix}") from None
        print(out)


if __name__ == "__main__":
    main()
