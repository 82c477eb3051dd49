"""How close imagined frames come to the real ones.

METRICS, LPIPS   frame by frame; LPIPS (Zhang et al. 2018) needs torchvision's AlexNet in a file
FVD              how far imagined clips lie from real ones, as a crowd (Unterthiner et al. 2018, arXiv
                 1812.01717): I3D's scores of either are taken for a normal distribution, and FVD is the
                 squared Fréchet distance of the two. The fewer the clips, the larger, whatever they show.
one step         how good the one UNet pass is that stage 3 reads its features from (paper section 3.2), at
                 the first sampling step, from noise alone. `latents`: error of the clean latents that it
                 predicts, per frame, root mean square; without guidance a good model predicts the mean of the
                 possible futures, blurred, but in the right place. `features`: mean square difference of the
                 features under two draws of noise, over that between two episodes. 0: the noise has no
                 influence; 1: the features say no more of the episode than of the noise.

Each beside that of a future which repeats the first frame (`…_still`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from defi.checkpoints.files import read_foreign
from defi.engine.data import SampleNoise
from defi.engine.weights import load_strict
from Step1_GFDM.evaluation.i3d import I3D, SIDE
from Step1_GFDM.model import GFDM

FEW = 256  # clips below which FVD says more about their number than about the model
BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's name
Frames = Float[Tensor, "F 3 H W"]  # in [-1, 1]
PerFrame = Float[Tensor, " F"]
Metric = Callable[[Frames, Frames], PerFrame]


def psnr(a: Frames, b: Frames) -> PerFrame:
    """Peak signal-to-noise ratio in dB; of equal frames 106."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a: Frames, b: Frames) -> PerFrame:
    """Structural similarity, Gaussian window of 11 pixels (Wang et al. 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

    _, similarity = structural_similarity_index_measure(a, b, data_range=2.0, return_full_image=True)
    return similarity[..., 5:-5, 5:-5].mean((1, 2, 3))  # at the borders the library reflects the picture


METRICS: dict[str, Metric] = {"psnr": psnr, "ssim": ssim}


def load_lpips(folder: Path | str) -> Metric:
    """LPIPS 0.1 with AlexNet, whose weights lie in the folder; torchmetrics brings the linear ones."""
    from torchmetrics.functional.image.lpips import _LPIPS

    model, file = _LPIPS(net="alex", pnet_rand=True), Path(folder) / BACKBONE
    # The library's slices of AlexNet keep the numbers of its layers.
    own = {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in model.net.state_dict().items()}
    tensors = {name: t for name, t in read_foreign(file).items() if not name.startswith("classifier.")}
    load_strict(own, tensors, source=file)
    return lambda a, b: model(a, b).flatten()


def per_frame(metrics: dict[str, Metric], imagined: Frames, real: Frames) -> dict[str, PerFrame]:
    """Each metric of the imagined future, and of one that repeats the first frame (`…_still`)."""
    futures = {"": imagined, "_still": real[:1].expand_as(real)}
    return {f"{k}{end}": metric(a, real) for end, a in futures.items() for k, metric in metrics.items()}


@torch.inference_mode()
def action_scores(i3d: I3D, imagined: Frames, real: Frames) -> dict[str, Float[Tensor, "400"]]:
    """I3D's scores of clips: `imagined`, `real`, and `still`, which repeats the first real frame.

    Resized without antialiasing, as the authors do.
    """
    clips = {"imagined": imagined, "real": real, "still": real[:1].expand_as(real)}
    frames = torch.cat(list(clips.values())).to(next(i3d.parameters()).device)
    resized = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
    scores = i3d(resized.unflatten(0, (len(clips), -1)).transpose(1, 2)).cpu()
    return dict(zip(clips, scores))


def fvd_figures(scores: dict[str, Float[Tensor, "E 400"]]) -> dict[str, Any] | None:
    """FVD of the `imagined` and of the `still` clips, from `action_scores`; None where there is one clip."""
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


@torch.no_grad()
def one_step_error(
    model: GFDM,
    latents: Float[Tensor, "F 4 h w"],
    text: str,
    *,
    other: tuple[Float[Tensor, "1 4 h w"], str],
    seed: int,
) -> dict[str, Tensor]:
    """What one episode adds to the figures: squared errors `latents` and `latents_still` [F], and the
    features' squared differences under another noise (`same`) and from another episode (`different`).

    latents: the real future, scaled. other: another episode's first latent and instruction.
    """
    device = model.unet.device
    latents = latents.to(device)
    noise = SampleNoise(torch.tensor([seed]), device).normal("one step", 2, *latents.shape)[0]
    predicted = model.predict_once(latents[:1], [text], noise=noise[:1])[0]
    here = model.features(latents[:1], [text], noise=noise[:1])
    again = model.features(latents[:1], [text], noise=noise[1:])
    there = model.features(other[0].to(device), [other[1]], noise=noise[1:])
    return {
        "latents": (predicted - latents).square().mean((1, 2, 3)).cpu(),
        "latents_still": (latents[:1] - latents).square().mean((1, 2, 3)).cpu(),
        "same": (here - again).square().mean().cpu(),
        "different": (here - there).square().mean().cpu(),
    }


def one_step_figures(errors: dict[str, Float[Tensor, "E ..."]]) -> dict[str, Any]:
    """Of E episodes' errors: latents and latents_still [F], and features, which is None for one episode."""
    mean = {name: values.mean(0) for name, values in errors.items()}
    figures = {name: mean[name].sqrt().tolist() for name in ("latents", "latents_still")}
    several = len(errors["same"]) > 1
    return figures | {"features": (mean["same"] / mean["different"]).item() if several else None}
