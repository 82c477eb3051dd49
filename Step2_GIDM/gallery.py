"""Which latent action moves what: pictures of pairs that got the same code, and their mean displacement."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from defi.engine.output import write_file
from Step2_GIDM.code_evaluation import CENTRES, CodeEvaluation, Transfer, displacement, mean_displacement

ROWS, EXAMPLES = 8, 3
FEWEST = 3  # pairs of a code that is shown
STYLE = {"font.size": 7, "axes.titlesize": 8, "figure.titlesize": 9, "legend.fontsize": 6}


def most_informative_place(indices: Int[Tensor, "N Q"], moves: Float[Tensor, "N 2"]) -> tuple[int, float]:
    """The place among the Q whose code says most about the motion, and the share of variance it explains."""
    moves = moves - moves.mean(0)
    chosen = torch.nn.functional.one_hot(indices).to(moves.dtype)  # [N,Q,codes]
    sums = torch.einsum("nqc,nd->qcd", chosen, moves).square().sum(-1)
    shares = (sums / chosen.sum(0).clamp(min=1)).sum(-1) / moves.square().sum().clamp(min=1e-12)
    return int(shares.argmax()), float(shares.max())


@matplotlib.rc_context(STYLE)
def draw_gallery(seen: CodeEvaluation, codes: int, path: Path) -> None:
    """One row per frequent code of the most informative place: mean displacement, and pairs as overlays."""
    frames = seen.frames.float() / 255
    move, weight = displacement(frames)
    moves = mean_displacement(move, weight)
    place, share = most_informative_place(seen.indices, moves)
    assigned = seen.indices[:, place]
    counts = torch.bincount(assigned, minlength=codes)
    shown = [int(code) for code in counts.argsort(descending=True)[:ROWS] if counts[code] >= FEWEST]
    rows = max(1, len(shown))
    figure = Figure((8, 1.2 + 2.1 * rows), layout="constrained")
    figure.suptitle(
        f"Code at place {place + 1}: explains {share:.0%} of the motion's variance. "
        "Red: before, cyan: after. Examples are evenly spaced, not chosen."
    )
    grid = figure.add_gridspec(rows + 1, EXAMPLES + 1, height_ratios=[0.7] + [1] * rows)
    usage = figure.add_subplot(grid[0, :], title="use of the codes", ylabel="share", xticks=range(codes))
    places = list(seen.indices.T.numpy())
    weights = [np.full(len(place), 1 / seen.indices.numel()) for place in places]
    labels = [f"place {number}" for number in range(1, len(places) + 1)]
    usage.hist(places, np.arange(codes + 1) - 0.5, weights=weights, stacked=True, rwidth=0.8, label=labels)
    usage.legend(ncols=2)
    for row, code in enumerate(shown, start=1):
        members = (assigned == code).nonzero().flatten()
        field, *examples = (figure.add_subplot(grid[row, column]) for column in range(EXAMPLES + 1))
        _draw_field(field, frames[members, 0], move[members], weight[members])
        words = direction(*moves[members].mean(0).tolist())
        field.set_title(f"code {code} ({len(members)} pairs): {words}")
        picks = members[torch.linspace(0, len(members) - 1, EXAMPLES).round().long()]
        for axis, pick in zip(examples, picks):
            axis.imshow(overlay(frames[pick]))
        for axis in (field, *examples):
            axis.axis("off")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())


def draw_transfer(found: Transfer, path: Path, *, rows: int = 6, columns: int = 4) -> None:
    """A row per action: the pair it was read from, then where it leads from other clips' frames."""
    rows, columns = min(rows, len(found.given)), min(columns, found.reached.shape[1])
    figure = Figure((1.7 * (columns + 1), 1.8 * rows), layout="constrained")
    title = "Red: before, cyan: after. Left: the pair an action is read from; right: applied to other clips."
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    for row, given, reached in zip(axes, found.given, found.reached):
        for axis, pair in zip(row, [given, *reached]):
            axis.imshow(overlay(pair))
            axis.axis("off")
    _save(figure, path)


def direction(dx: float, dy: float) -> str:
    """A mean displacement in words; numbers are per cent of the picture's side."""
    size = (dx * dx + dy * dy) ** 0.5
    if size < 0.005:
        return "little motion"
    parts = ((-dy, "up"), (dy, "down"), (-dx, "left"), (dx, "right"))
    return f"{' '.join(word for part, word in parts if part > 0.38 * size)} {size:.0%}"


def overlay(pair: Float[Tensor, "2 3 H W"]) -> Float[np.ndarray, "H W 3"]:
    """Both frames in one: a dark object is red where it was and cyan where it went."""
    now, later = pair.mean(1)
    return torch.stack([later, now, now], dim=-1).numpy()


def _draw_field(
    axis: Axes, now: Float[Tensor, "N 3 H W"], move: Float[Tensor, "N 2 G G"], weight: Float[Tensor, "N G G"]
) -> None:
    side = now.shape[-1]
    axis.imshow(now.mean((0, 1)).numpy(), cmap="gray", vmin=0, vmax=1.4)
    total = weight.sum(0)
    field = (move * weight[:, None]).sum(0) / total.clamp(min=1e-6) * side
    y, x = torch.meshgrid(CENTRES * side, CENTRES * side, indexing="ij")
    strong = total > 0.25 * total.max().clamp(min=1e-6)
    arrows = (x[strong], y[strong], field[0][strong], field[1][strong])
    axis.quiver(*arrows, angles="xy", scale_units="xy", scale=1, color="crimson", width=0.012)
