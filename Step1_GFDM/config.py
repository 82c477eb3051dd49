"""Sizes and constants of stage 1; the defaults are those of the published model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from defi.config import typed
from defi.errors import UserError
from defi.text import TextConfig


def check_counts(cfg: Mapping[str, Any], **least: int) -> None:
    """Raises UserError if one of these settings is no whole number, or less than its least."""
    for name, smallest in least.items():
        if not isinstance(cfg[name], int) or cfg[name] < smallest:
            raise UserError(f"{name}={cfg[name]}: must be a whole number, at least {smallest}")


def check_rate(name: str, fps: Any) -> None:
    """Raises UserError for frames per second that no video has."""
    if not isinstance(fps, (int, float)) or not 0 < fps < 1000:
        raise UserError(f"{name}={fps}: must be a number of frames per second, more than 0, less than 1000")


@dataclass
class UNetSizes:
    """`UNetSpatioTemporalConditionModel` from the finest level to the coarsest.

    attention: whether a level has spatial, temporal and text attention besides its convolutions.
    """

    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    num_attention_heads: list[int] = field(default_factory=lambda: [5, 10, 20, 20])
    attention: list[bool] = field(default_factory=lambda: [True, True, True, False])
    layers_per_block: int = 2
    addition_time_embed_dim: int = 256


@dataclass
class VAESizes:
    """Widths of `AutoencoderKLTemporalDecoder`; each block but the last halves the resolution."""

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    latent_channels: int = 4


@dataclass
class DiffusionConfig:
    """EDM training: sigma = exp(sigma_mean + sigma_std·n), text zeroed for a share of the samples."""

    sigma_mean: float = 0.7
    sigma_std: float = 1.6
    text_dropout: float = 0.05
    fps: int = 7
    motion_bucket: int = 127


@dataclass
class SamplingConfig:
    """Euler steps; guidance rises linearly over the frames."""

    steps: int = 30
    min_guidance: float = 1.0
    max_guidance: float = 3.0
    noise_aug: float = 0.02


@dataclass
class FeatureConfig:
    """What stage 3 reads: the UNet at the first step of a `steps`-step schedule, with its own time ids."""

    steps: int = 20
    fps: int = 4
    motion_bucket: int = 127


@dataclass
class GFDMConfig:
    """frames: F. frame_step: steps of the recording from one frame to the next, so that frame i is
    i · frame_step steps ahead. image_size: H = W in pixels. pretrained: a Stable Video Diffusion folder to
    start from instead of random weights; its sizes then replace `unet` and `vae`.
    gradient_checkpointing: in training, compute the UNet's activations again instead of keeping them.
    """

    frames: int = 16
    frame_step: int = 2
    image_size: int = 256
    pretrained: str | None = None
    gradient_checkpointing: bool = False
    unet: UNetSizes = field(default_factory=UNetSizes)
    vae: VAESizes = field(default_factory=VAESizes)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    clip: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if self.frame_step < 1:
            raise UserError(f"gfdm.frame_step={self.frame_step}: steps of the recording, must be at least 1")

    @classmethod
    def from_preset(cls, cfg: Mapping[str, Any]) -> "GFDMConfig":
        """From a composed configuration: its sections `gfdm` and `text.clip`."""
        return typed(cls, {**cfg["gfdm"], "clip": cfg["text"]["clip"]}, "gfdm")

    @property
    def clip_frames(self) -> range:
        """Steps of the recording at which the F frames of a clip lie, counted from its first."""
        return range(0, self.frames * self.frame_step, self.frame_step)

    @property
    def latent_size(self) -> int:
        """h = w in latent pixels."""
        return self.image_size // 2 ** (len(self.vae.block_out_channels) - 1)

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """[F, 4, h, w], the latents of a clip."""
        return self.frames, self.vae.latent_channels, self.latent_size, self.latent_size

    def fake_batch(self, batch_size: int, seed: int = 0) -> dict[str, Tensor | list[str]]:
        """Valid training input: latents [B, F, 4, h, w] of unit deviation, instructions, sample seeds."""
        random = torch.Generator().manual_seed(seed)
        latents = torch.randn(batch_size, *self.clip_shape, generator=random)
        text = [f"push the block {i} to the left" for i in range(batch_size)]
        return {"latents": latents, "text": text, "seed": torch.arange(batch_size) + seed}
