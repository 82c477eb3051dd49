"""Transformer blocks of the latent action model (paper section "General Inverse Dynamics Model").

B batch, F frames of a pair (2), S tokens of a frame, D width. Attention runs over the tokens of one frame
(spatial) or over the frames of one token (temporal, causal); everything is pre-LayerNorm and residual.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


def sinusoid(length: int, width: int, *, device: torch.device | None = None) -> Float[Tensor, "S D"]:
    """Sinusoidal positions: sine on even, cosine on odd channels (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(torch.arange(0, width, 2, device=device).float() * (-math.log(10_000.0) / width))
    angles = torch.arange(length, device=device).float()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class SelfAttention(nn.Module):
    """Multi-head self-attention: q, k, v without bias in one product, output projection with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "N S D"], *, key_mask: Bool[Tensor, "N S"] | None = None, causal: bool = False
    ) -> Float[Tensor, "N S D"]:
        """`key_mask` is true where a token may be attended to."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if key_mask is None else key_mask[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """Linear to 4 D, exact GELU, Linear back."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class SpatialBlock(nn.Module):
    """Attention over the tokens of each frame, then a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.spatial_norm = nn.LayerNorm(width)
        self.spatial = SelfAttention(width, heads)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = feed_forward(width)

    def forward(
        self, x: Float[Tensor, "B S D"], key_mask: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        x = x + self.spatial(self.spatial_norm(x), key_mask=key_mask)
        return x + self.ffn(self.ffn_norm(x))


class SpatioTemporalBlock(nn.Module):
    """Attention over the tokens of a frame, causal attention over the frames of a token, feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.spatial_norm = nn.LayerNorm(width)
        self.spatial = SelfAttention(width, heads)
        self.temporal_norm = nn.LayerNorm(width)
        self.temporal = SelfAttention(width, heads)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = feed_forward(width)

    def forward(
        self, x: Float[Tensor, "B F S D"], key_mask: Bool[Tensor, "BF S"] | None = None
    ) -> Float[Tensor, "B F S D"]:
        batch, frames = x.shape[:2]
        y = self.spatial(self.spatial_norm(x).flatten(0, 1), key_mask=key_mask)
        x = x + y.unflatten(0, (batch, frames))
        y = self.temporal(self.temporal_norm(x).transpose(1, 2).flatten(0, 1), causal=True)
        x = x + y.unflatten(0, (batch, -1)).transpose(1, 2)
        return x + self.ffn(self.ffn_norm(x))


def input_projection(in_width: int, width: int) -> nn.Sequential:
    """LayerNorm, Linear, LayerNorm: how tokens enter the encoder and the decoder."""
    return nn.Sequential(nn.LayerNorm(in_width), nn.Linear(in_width, width), nn.LayerNorm(width))
