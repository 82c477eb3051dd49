"""The part of SVD's UNet that stage 3 reads (paper section 3.2): conv_in, down, mid, up blocks 0 and 1."""

import torch
import torch.nn.functional as F
from diffusers import UNetSpatioTemporalConditionModel
from jaxtyping import Float
from torch import Tensor

FEATURE_PARTS = (
    "conv_in",
    "time_embedding",
    "add_embedding",
    "down_blocks",
    "mid_block",
    "up_blocks.0",
    "up_blocks.1",
)
"""Every sub-network of the UNet that `up_block_features` runs."""


def _time_embedding(
    unet: UNetSpatioTemporalConditionModel, timestep: Tensor, time_ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """[B] timesteps and [B, 3] added time ids -> [B, D]."""
    embedding = unet.time_embedding(unet.time_proj(timestep.to(time_ids.device)).to(dtype))
    added = unet.add_time_proj(time_ids.flatten()).reshape(len(time_ids), -1)
    return embedding + unet.add_embedding(added.to(dtype))


def up_block_features(
    unet: UNetSpatioTemporalConditionModel,
    sample: Float[Tensor, "B F 8 h w"],
    timestep: Float[Tensor, " B"],
    text: Float[Tensor, "B T D"],
    time_ids: Float[Tensor, "B 3"],
) -> Float[Tensor, "B F C h2 w2"]:
    """One pass that stops after up block 1: nearest-upsampled output of up block 0, then that of up block 1.

    With four levels h2 = h/2; nothing above those blocks is computed.
    """
    batch, frames = sample.shape[:2]
    context = {
        "temb": _time_embedding(unet, timestep, time_ids, sample.dtype).repeat_interleave(frames, dim=0),
        "image_only_indicator": sample.new_zeros(batch, frames),
    }
    text = text.repeat_interleave(frames, dim=0)

    def run(block, hidden: Tensor, **extra):
        if getattr(block, "has_cross_attention", False):
            extra["encoder_hidden_states"] = text
        return block(hidden_states=hidden, **context, **extra)

    hidden = unet.conv_in(sample.flatten(0, 1))
    skips = [hidden]
    for block in unet.down_blocks:
        hidden, outputs = run(block, hidden)
        skips += outputs
    hidden = unet.mid_block(hidden_states=hidden, encoder_hidden_states=text, **context)
    outputs = []
    for block in unet.up_blocks[:2]:
        count = len(block.resnets)
        skips, residuals = skips[:-count], tuple(skips[-count:])
        hidden = run(block, hidden, res_hidden_states_tuple=residuals)
        outputs.append(hidden)
    coarse, fine = outputs
    coarse = F.interpolate(coarse, scale_factor=2, mode="nearest")
    return torch.cat([coarse, fine], dim=1).unflatten(0, (batch, frames))
