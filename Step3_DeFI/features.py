"""From pictures to features of the imagined future: the one path of preparation, training and rollout."""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from defi.engine.data import SampleNoise
from Step1_GFDM.model import GFDM
from Step3_DeFI.observation import to_unit


@torch.no_grad()
def encode_views(
    gfdm: GFDM, images: UInt8[Tensor, "B V 3 H W"] | Float[Tensor, "B V 3 H W"]
) -> Float[Tensor, "B V 4 h w"]:
    """Scaled latents of pictures (uint8, or floats in [-1, 1])."""
    return gfdm.encode_images(to_unit(images).flatten(0, 1)).unflatten(0, images.shape[:2])


def imagine(
    gfdm: GFDM, latents: Float[Tensor, "B V 4 h w"], texts: list[str], *, noise: Float[Tensor, "B V F 4 h w"]
) -> Float[Tensor, "B V F L C"]:
    """Features of all views' futures; each view is a clip of its own. `latents` are scaled."""
    batch, views = latents.shape[:2]
    per_clip = [text for text in texts for _ in range(views)]
    features = gfdm.features(latents.flatten(0, 1), per_clip, noise=noise.flatten(0, 1))
    return features.unflatten(0, (batch, views))


def video_noise(
    gfdm: GFDM, seeds: Int[Tensor, " B"], *, views: int, kind: str, device: torch.device
) -> Float[Tensor, "B V F 4 h w"]:
    """Noise that GFDM starts from: `fresh`: a function of each sample's seed; `fixed`: one for all."""
    config = gfdm.config
    shape = (views, config.frames, config.vae.latent_channels, config.latent_size, config.latent_size)
    if kind == "fixed":
        return SampleNoise(torch.zeros(1, dtype=torch.long), device).normal(*shape).expand(len(seeds), *shape)
    return SampleNoise(seeds, device).normal(*shape)
