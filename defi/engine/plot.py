"""Curves of training runs from their `metrics.jsonl`: `python -m defi.engine.plot <run> [<run> …]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from defi.engine.tracking import METRICS, read_metrics
from defi.errors import UserError

Curve = tuple[np.ndarray, np.ndarray]  # steps, values
BOOKKEEPING = ("kind", "step", "epoch", "elapsed_s")


def curves(path: Path | str) -> dict[str, Curve]:
    """Every number of a run as (steps, values), under `<kind>/<name>`, such as `train/loss`.

    Args:
        path: a run's output folder or its metrics.jsonl.
    """
    path = Path(path)
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(path / METRICS if path.is_dir() else path):
        for name, value in record.items():
            if name not in BOOKKEEPING and isinstance(value, int | float):
                points.setdefault(f"{record['kind']}/{name}", []).append((record["step"], value))
    return {name: tuple(np.array(pairs, dtype=float).T) for name, pairs in points.items()}


def draw(runs: Sequence[Path], out: Path) -> Path:
    """Draw the curves of the runs, one panel per number, into a PNG file."""
    by_run = {str(run): curves(run) for run in runs}
    names = list(dict.fromkeys(name for found in by_run.values() for name in found))
    if not names:
        raise UserError(
            f"{runs[0]}: {METRICS} holds no numbers yet; wait for the first trainer.log_every steps"
        )
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes.flat, names):
        for run, found in by_run.items():
            if name in found:
                steps, values = found[name]
                axis.plot(steps, values, label=run, marker="." if len(steps) < 20 else None)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        if name.endswith("loss") and all(
            np.all(found[name][1] > 0) for found in by_run.values() if name in found
        ):
            axis.set_yscale("log")
    for axis in axes.flat[len(names) :]:
        axis.remove()
    if len(by_run) > 1:
        axes.flat[0].legend(fontsize="small")
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m defi.engine.plot", description="Draw curves of training runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of training runs")
    parser.add_argument("--out", type=Path, help="picture to write (default: curves.png in the first run)")
    options = parser.parse_args()
    try:
        print(draw(options.runs, options.out or options.runs[0] / "curves.png"))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
