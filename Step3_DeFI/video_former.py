"""VideoFormer: a perceiver that distils the features of the imagined video into a few tokens per frame.

DeFI (arXiv 2604.16391), action policy; the perceiver block is Flamingo's (arXiv 2204.14198, section 3.1.1).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class QueryAttention(nn.Module):
    """Queries attend to features and each other: q from LN(queries), k, v from LN(features) ⊕ LN(queries)."""

    def __init__(self, dim: int, *, heads: int, head_dim: int):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.feature_norm = nn.LayerNorm(dim)
        self.query_norm = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, inner, bias=False)
        self.to_key = nn.Linear(dim, inner, bias=False)
        self.to_value = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self, features: Float[Tensor, "N L D"], queries: Float[Tensor, "N Q D"]
    ) -> Float[Tensor, "N Q D"]:
        queries = self.query_norm(queries)
        context = torch.cat([self.feature_norm(features), queries], dim=1)
        q, k, v = (
            rearrange(x, "n l (h d) -> n h l d", h=self.heads)
            for x in (self.to_query(queries), self.to_key(context), self.to_value(context))
        )
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h q d -> n q (h d)"))


class TemporalAttention(nn.Module):
    """Every query attends to itself in all frames. No norm before it, heads of width D / heads."""

    def __init__(self, dim: int, *, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B F Q D"]) -> Float[Tensor, "B F Q D"]:
        q, k, v = rearrange(self.qkv(x), "b f q (n h d) -> n (b q) h f d", n=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(y, "(b q) h f d -> b f q (h d)", b=len(x)))


class VideoFormerLayer(nn.Module):
    """Cross-attention per frame, temporal attention per query, feed-forward; each one residual."""

    def __init__(self, dim: int, *, heads: int, head_dim: int, ff_mult: int):
        super().__init__()
        self.cross = QueryAttention(dim, heads=heads, head_dim=head_dim)
        self.temporal = TemporalAttention(dim, heads=heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, ff_mult * dim, bias=False),
            nn.GELU(),
            nn.Linear(ff_mult * dim, dim, bias=False),
        )

    def forward(
        self, features: Float[Tensor, "B F L D"], queries: Float[Tensor, "B F Q D"]
    ) -> Float[Tensor, "B F Q D"]:
        seen = self.cross(features.flatten(0, 1), queries.flatten(0, 1))
        queries = queries + seen.unflatten(0, queries.shape[:2])
        queries = queries + self.temporal(queries)
        return queries + self.feed_forward(queries)


class VideoFormer(nn.Module):
    """Features of all views of each frame → `queries` tokens per frame."""

    def __init__(
        self,
        *,
        feature_channels: int,
        dim: int,
        depth: int,
        heads: int,
        head_dim: int,
        frames: int,
        queries: int,
        ff_mult: int = 4,
    ):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(feature_channels, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.queries = nn.Parameter(torch.randn(frames, queries, dim))
        self.frame_embedding = nn.Parameter(torch.randn(frames, 1, dim))
        self.layers = nn.ModuleList(
            VideoFormerLayer(dim, heads=heads, head_dim=head_dim, ff_mult=ff_mult) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Float[Tensor, "B F N C"]) -> Float[Tensor, "B FQ D"]:
        """N: the tokens of all views, joined. → F·Q tokens, frame by frame."""
        x = self.project(features) + self.frame_embedding
        queries = self.queries.expand(len(x), -1, -1, -1)
        for layer in self.layers:
            queries = layer(x, queries)
        return self.norm(queries).flatten(1, 2)
