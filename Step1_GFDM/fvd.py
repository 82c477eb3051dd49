"""FVD: how far imagined clips lie from real ones, as a crowd (Unterthiner et al. 2018, arXiv 1812.01717).

I3D's scores of the real clips and of the imagined ones are each taken for a normal distribution; FVD is the
squared Fréchet distance of the two. The fewer the clips, the larger the figure, whatever they show.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from Step1_GFDM.i3d import I3D, SIDE

FEW = 256  # clips below which the figure says more about their number than about the model


@torch.inference_mode()
def action_scores(
    i3d: I3D, imagined: Float[Tensor, "F 3 H W"], real: Float[Tensor, "F 3 H W"]
) -> dict[str, Float[Tensor, "400"]]:
    """I3D's scores of clips in [-1, 1]: `imagined`, `real`, and `still`, which repeats the first real frame.

    Resized without antialiasing, as the authors do.
    """
    clips = {"imagined": imagined, "real": real, "still": real[:1].expand_as(real)}
    frames = torch.cat(list(clips.values())).to(next(i3d.parameters()).device)
    resized = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
    scores = i3d(resized.unflatten(0, (len(clips), -1)).transpose(1, 2)).cpu()
    return dict(zip(clips, scores))


def fvd_figures(parts: dict[str, list[Tensor]]) -> dict[str, Any] | None:
    """FVD of the `imagined` and of the `still` clips, from I3D's scores; None where there is one clip."""
    scores = {name: torch.stack(rows) for name, rows in parts.items()}
    clips = len(scores["real"])
    if clips == 1:
        return None
    few = f"biased upwards by so few clips; give at least episodes={FEW}" if clips < FEW else None
    distances = {name: frechet_distance(scores[name], scores["real"]) for name in ("imagined", "still")}
    return {**distances, "clips": clips, "warning": few}


def frechet_distance(a: Float[Tensor, "N D"], b: Float[Tensor, "M D"]) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½) of two samples of at least two rows, in float64.

    With Σa = XᵀX and Σb = YᵀY the trace of the root is the sum of the singular values of X Yᵀ: no root of a
    matrix without full rank is taken. QR makes X and Y square where there are more rows than columns.
    """
    a, b = a.double(), b.double()
    x, y = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    cross = torch.linalg.svdvals(torch.linalg.qr(x, mode="r").R @ torch.linalg.qr(y, mode="r").R.T)
    distance = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross.sum()
    return max(distance.item(), 0.0)  # rounding
