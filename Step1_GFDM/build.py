"""Stable Video Diffusion's networks at the sizes of a preset, with random weights."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel

from Step1_GFDM.config import GFDMConfig, UNetSizes, VAESizes


def build_scheduler() -> EulerDiscreteScheduler:
    """SVD's sampling schedule: v-prediction, Karras sigmas 0.002…700, continuous timesteps ln(sigma)/4.

    Its few numbers stay in main memory: on a GPU each would have to be waited for.
    """
    with torch.device("cpu"):  # whatever device the networks are being built on
        return EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="leading",
            timestep_type="continuous",
            steps_offset=1,
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        )


def build_vae(sizes: VAESizes, image_size: int) -> AutoencoderKLTemporalDecoder:
    """A temporal VAE with random weights."""
    return AutoencoderKLTemporalDecoder(
        down_block_types=["DownEncoderBlock2D"] * len(sizes.block_out_channels),
        block_out_channels=sizes.block_out_channels,
        layers_per_block=sizes.layers_per_block,
        latent_channels=sizes.latent_channels,
        sample_size=image_size,
    )


def build_unet(config: GFDMConfig, text_width: int) -> UNetSpatioTemporalConditionModel:
    """A UNet with random weights; text tokens come concatenated with themselves, hence twice their width."""
    kinds = [
        "CrossAttn{}BlockSpatioTemporal" if has else "{}BlockSpatioTemporal" for has in config.unet.attention
    ]
    return UNetSpatioTemporalConditionModel(
        sample_size=config.latent_size,
        in_channels=2 * config.vae.latent_channels,
        out_channels=config.vae.latent_channels,
        down_block_types=[kind.format("Down") for kind in kinds],
        up_block_types=[kind.format("Up") for kind in reversed(kinds)],
        block_out_channels=config.unet.block_out_channels,
        layers_per_block=config.unet.layers_per_block,
        num_attention_heads=config.unet.num_attention_heads,
        cross_attention_dim=2 * text_width,
        addition_time_embed_dim=config.unet.addition_time_embed_dim,
        projection_class_embeddings_input_dim=3 * config.unet.addition_time_embed_dim,
        num_frames=config.frames,
    )


def sizes_of(unet: UNetSpatioTemporalConditionModel, vae: AutoencoderKLTemporalDecoder) -> dict[str, Any]:
    """The sections `unet` and `vae` of a `GFDMConfig` from which such networks would be built."""
    attention = [kind.startswith("CrossAttn") for kind in unet.config.down_block_types]
    return {
        "unet": _sizes(UNetSizes, {**unet.config, "attention": attention}),
        "vae": _sizes(VAESizes, vae.config),
    }


def _sizes(cls: type, config: Mapping[str, Any]) -> Any:
    values = {field.name: config[field.name] for field in fields(cls)}
    return cls(**{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()})
