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
    model.scheduler.set_timesteps(wanted.steps, device=noise.device)
    timestep = model.scheduler.timesteps[0]
    sample = noise * model.scheduler.init_noise_sigma
    prediction = model.unet(
        torch.cat([model.scheduler.scale_model_input(sample, timestep), image], dim=2),
        timestep,
        encoder_hidden_states=model.encode_text(texts),
        added_time_ids=model.time_ids(len(first), wanted.fps, wanted.motion_bucket, 0.0),
    ).sample
    return model.scheduler.step(prediction, timestep, sample).pred_original_sample


class OneStepError:
    """Both figures, gathered episode by episode."""

    def __init__(self, model: GFDM) -> None:
        self.model = model
        self.errors: dict[str, list[Tensor]] = {"latents": [], "latents_still": []}
        self.same: list[Tensor] = []
        self.different: list[Tensor] = []
        self.previous: Tensor | None = None

    @torch.no_grad()
    def add(self, latents: Float[Tensor, "F 4 h w"], text: str, *, seed: int) -> None:
        """One episode's real scaled latents and its instruction."""
        model, latents = self.model, latents.to(self.model.unet.device)
        first, still = latents[:1], latents[:1].expand_as(latents)
        noise = SampleNoise(torch.tensor([seed]), latents.device).normal(2, *latents.shape)[0]
        predicted = predict_once(model, first, [text], noise=noise[:1])[0]
        for name, value in (("latents", predicted), ("latents_still", still)):
            self.errors[name].append((value - latents).square().mean((1, 2, 3)))
        features = model.features(first.expand(2, *first.shape[1:]), [text, text], noise=noise)
        self.same.append((features[0] - features[1]).square().mean())
        if self.previous is not None:
            self.different.append((features[0] - self.previous).square().mean())
        self.previous = features[1]

    def figures(self) -> dict[str, list[float] | float | None]:
        """latents and latents_still: [F]. features: None where there was one episode only."""
        errors = {name: torch.stack(values).mean(0).sqrt().tolist() for name, values in self.errors.items()}
        if not self.different:
            return {**errors, "features": None}
        ratio = torch.stack(self.same).mean() / torch.stack(self.different).mean()
        return {**errors, "features": ratio.item()}
