"""The video model below a policy: from pictures to features of the imagined future, and which weights learn.

One path for preparation, training and rollout.
"""

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from defi.engine.data import SampleNoise
from Step1_GFDM.model import GFDM
from Step1_GFDM.unet import FEATURE_PARTS
from Step3_DeFI.config import PRECISIONS, PolicyConfig
from Step3_DeFI.observation import to_unit

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # projections that LoRA adapts


def set_up(gfdm: GFDM, config: PolicyConfig) -> None:
    """Put UNet and VAE in their precision, and freeze all of `gfdm` but the part of its UNet that learns.

    What learns is what a loss reaches: the way to the features, or the whole UNet where there is a video
    loss; with LoRA, adapters that are added here. The UNet's activations are computed again on the way back:
    those of 16 frames take too much memory.
    """
    if config.video_precision != "no":
        for network in (gfdm.unet, gfdm.vae):
            nn.Module.to(network, PRECISIONS[config.video_precision])  # diffusers' own prints a warning
    gfdm.requires_grad_(False)
    if config.finetune.mode == "none":
        return
    parts = ("",) if config.finetune.video_loss else FEATURE_PARTS
    if config.finetune.mode == "full":
        for part in parts:
            gfdm.unet.get_submodule(part).requires_grad_(True)
    else:
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and only wanted here

        # arXiv 2106.09685, on the attention's projections; the first output is that of the bare UNet.
        names = [n for n, _ in gfdm.unet.named_modules() if n.startswith(parts) and n.endswith(ATTENTION)]
        rank = config.finetune.rank
        adapters = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        inject_adapter_in_model(adapters, gfdm.unet, "policy")
    gfdm.unet.enable_gradient_checkpointing()


def idle(module: nn.Module, name: str) -> Iterator[str]:
    """Dotted names, below `name`, of the largest sub-networks in which no weight learns."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        yield name
        return
    for child_name, child in module.named_children():
        yield from idle(child, f"{name}.{child_name}")


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
    gfdm: GFDM, config: PolicyConfig, seeds: Int[Tensor, " B"], device: torch.device
) -> Float[Tensor, "B V F 4 h w"]:
    """Noise that GFDM starts from, other for each view: a function of each sample's seed, or of nothing if
    `feature_noise: fixed`."""
    sizes = gfdm.config
    shape = (sizes.frames, sizes.vae.latent_channels, sizes.latent_size, sizes.latent_size)
    draw = SampleNoise(torch.zeros_like(seeds[:1]) if config.feature_noise == "fixed" else seeds, device)
    views = [draw.normal(f"features of view {view}", *shape) for view in range(config.views)]
    return torch.stack(views, dim=1).expand(len(seeds), -1, -1, -1, -1, -1)


def merge_tokens(features: Float[Tensor, "B V F L C"], side: int) -> Float[Tensor, "B V F M D"]:
    """Squares of side × side neighbouring tokens as one: M = L / side² tokens of D = C·side² channels.

    The projection that follows then has a weight of its own for each place in a square, so that a small
    policy learns where things are in far fewer steps. Side 1 leaves the tokens as they are.
    """
    rows = math.isqrt(features.shape[3]) // side
    return rearrange(features, "b v f (y p x q) c -> b v f (y x) (p q c)", y=rows, p=side, q=side)


class Standardise(nn.Module):
    """Features less their mean over the training data, by their deviation, at each place and channel.

    Most of what a small video model's features hold is the same in every picture of a scene; without this
    a policy trained for minutes hardly sees the rest. The figures are buffers: they belong to the weights.
    """

    def __init__(self, views: int, tokens: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(views, 1, tokens, channels))
        self.register_buffer("deviation", torch.ones(views, 1, tokens, channels))

    @torch.no_grad()
    def fit(self, features: Float[Tensor, "B V F L C"]) -> None:
        """Take the figures from these features, over samples and frames."""
        self.mean.copy_(features.mean((0, 2), dtype=torch.float32)[:, None])
        self.deviation.copy_(features.float().std((0, 2))[:, None].clamp_min(1e-3))

    def forward(self, features: Float[Tensor, "B V F L C"]) -> Float[Tensor, "B V F L C"]:
        return (features - self.mean) / self.deviation
