"""Report pages: one HTML file each, no network, readable in light and dark.

A page is a Jinja2 template that extends `defi/assets/page.html.j2`. Whatever is filled in is escaped, so an
instruction or a file name can hold anything. Pictures, videos and charts are embedded.
"""

import base64
import io
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from defi.engine.output import write_file

ROOT = Path(__file__).resolve().parents[1]
GREY = "#75828f"  # like the colours of the curves, readable on white and on black
CHART_STYLE = {
    "axes.prop_cycle": matplotlib.cycler(
        color=["#2f8fd8", "#e0793a", "#23a57a", "#b56bb0", "#a98b1a", "#5aa9c9"]
    ),
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25,
    "legend.frameon": False, "legend.labelcolor": GREY, "font.size": 9, "lines.linewidth": 1.5,
    "text.parse_math": False, "svg.hashsalt": "defi",
}  # fmt: skip
MOST_POINTS = 400  # of a curve


@matplotlib.rc_context(CHART_STYLE)
def embed(content: Path | Figure) -> str:
    """A file, its kind taken from its name, or a chart as SVG, as a `data:` address."""
    if isinstance(content, Path):
        kind, data = mimetypes.guess_type(content.name)[0], content.read_bytes()
    else:
        buffer = io.BytesIO()
        content.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        kind, data = "image/svg+xml", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


TEMPLATES = Environment(
    loader=FileSystemLoader(ROOT),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["embed"] = embed


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill in a template and write the page, replacing an older one in one step; its folder is made.

    `template` is a path from the root of the packages; a value that it asks for and does not get is an error.
    """
    page = TEMPLATES.get_template(template).render(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page)
    return path


@matplotlib.rc_context(CHART_STYLE)
def line_chart(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, log_y: bool = False
) -> Figure:
    """Curves {name: (x, y)}. Long ones are thinned, keeping their ends; few points are marked.

    Values that are not finite (on a log axis: not positive) leave gaps.
    """
    figure = Figure((4.2, 2.3), layout="constrained")
    axis = figure.subplots()
    for name, (x, y) in curves.items():
        kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int))
        marker = "." if len(kept) <= 30 else ""
        axis.plot(np.asarray(x, float)[kept], np.asarray(y, float)[kept], marker=marker, label=name)
    axis.set_xlabel(x_label)
    if log_y:
        log_scale(axis)
    if curves:
        figure.legend(loc="outside upper left", ncols=len(curves))
    return figure


def log_scale(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers beside it; values that are not positive leave gaps."""
    axis.set_yscale("log", nonpositive="mask")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())
