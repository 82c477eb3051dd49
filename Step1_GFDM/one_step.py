"""How good is the one UNet pass that stage 3 reads its features from (paper section 3.2)?

It runs at the first sampling step, from noise alone. Two figures say how much of the future it holds:

latents:  error of the clean latents that this pass predicts, per frame, against the real future's; root mean
          square, beside that of a future which repeats the first frame (`latents_still`). Without guidance a
          good model predicts the mean of the possible futures: blurred, but in the right place.
features: mean square difference of the features under two draws of noise, over that between two episodes.
          0: the noise has no influence; 1: the features say no more of the episode than of the noise.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from defi.engine.data import SampleNoise
from Step1_GFDM.model import GFDM


@torch.no_grad()
def predict_once(
    model: GFDM, first: Float[Tensor, "N 4 h w"], texts: list[str], *, noise: Float[Tensor, "N F 4 h w"]
) -> Float[Tensor, "N F 4 h w"]:
    """Scaled clean latents as predicted by the pass of `GFDM.features`, run to its end."""
    wanted = model.config.features
    image = (first / model.scaling).unsqueeze(1).expand_as(noise)
    model.scheduler.set_timesteps(wanted.steps)
    timestep = model.scheduler.timesteps[0]
    sample = noise * model.scheduler.init_noise_sigma
    prediction = model.unet(
        torch.cat([model.scheduler.scale_model_input(sample, timestep), image], dim=2),
        timestep,
        encoder_hidden_states=model.encode_text(texts),
        added_time_ids=model.time_ids(len(first), wanted.fps, wanted.motion_bucket, 0.0),
    ).sample
    return model.scheduler.step(prediction, timestep, sample).pred_original_sample


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
    first, still = latents[:1], latents[:1].expand_as(latents)
    noise = SampleNoise(torch.tensor([seed]), device).normal("one step", 2, *latents.shape)[0]
    predicted = predict_once(model, first, [text], noise=noise[:1])[0]
    here, again, there = (
        model.features(look, [words], noise=noise[draw : draw + 1])
        for look, words, draw in ((first, text, 0), (first, text, 1), (other[0].to(device), other[1], 1))
    )
    return {
        "latents": (predicted - latents).square().mean((1, 2, 3)),
        "latents_still": (still - latents).square().mean((1, 2, 3)),
        "same": (here - again).square().mean(),
        "different": (here - there).square().mean(),
    }


def one_step_figures(parts: dict[str, list[Tensor]]) -> dict[str, list[float] | float | None]:
    """latents and latents_still: [F]. features: None where there is one episode only."""
    mean = {name: torch.stack(values).mean(0) for name, values in parts.items()}
    alone = len(parts["same"]) == 1
    return {
        "latents": mean["latents"].sqrt().tolist(),
        "latents_still": mean["latents_still"].sqrt().tolist(),
        "features": None if alone else (mean["same"] / mean["different"]).item(),
    }
