"""How good is the one UNet pass that stage 3 reads its features from (paper section 3.2)?

It runs at the first sampling step, from noise alone. Two figures say how much of the future it holds:

latents:  error of the clean latents that this pass predicts, per frame, against the real future's; root mean
          square, beside that of a future which repeats the first frame (`latents_still`). Without guidance a
          good model predicts the mean of the possible futures: blurred, but in the right place.
features: mean square difference of the features under two draws of noise, over that between two episodes.
          0: the noise has no influence; 1: the features say no more of the episode than of the noise.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from defi.engine.data import SampleNoise
from Step1_GFDM.model import GFDM

FirstAndText = tuple[Float[Tensor, "1 4 h w"], str]


@torch.no_grad()
def one_step_error(
    model: GFDM, latents: Float[Tensor, "F 4 h w"], text: str, *, other: FirstAndText, seed: int
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
    several = len(errors["same"]) > 1
    return {
        "latents": mean["latents"].sqrt().tolist(),
        "latents_still": mean["latents_still"].sqrt().tolist(),
        "features": (mean["same"] / mean["different"]).item() if several else None,
    }
