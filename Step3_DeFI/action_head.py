"""Action head: a transformer encoder over the context and a σ-conditioned decoder over the noisy actions.

DeFI (arXiv 2604.16391), action policy; the denoiser is MDT's (arXiv 2407.05996) with a second stream of
latent-action tokens. The context depends neither on σ nor on the noisy actions, so it is encoded once per
chunk, keys and values of the decoder's cross-attention included. The noise levels of a schedule depend on
nothing, and are embedded all at once.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from Step3_DeFI.config import ActionHeadConfig

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values [B, heads, tokens, D / heads] of the encoded context, one pair per decoder layer."""

NoiseLevels = list[Tensor]
"""What a noise level makes of AdaLN: shifts, scales and gates [..., 6 D], one tensor per decoder layer."""


class Attention(nn.Module):
    """Multi-head attention: q, k, v with bias, output without."""

    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def _split(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N d"]:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def keys_values(self, context: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor]:
        return self._split(self.key(context)), self._split(self.value(context))

    def forward(
        self,
        x: Float[Tensor, "B M D"],
        keys_values: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B M D"]:
        k, v = self.keys_values(x) if keys_values is None else keys_values
        y = F.scaled_dot_product_attention(
            self._split(self.query(x)),
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.residual_dropout(self.out(rearrange(y, "b h n d -> b n (h d)")))


def feed_forward(config: ActionHeadConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.dim, 4 * config.dim, bias=False),
        nn.GELU(),
        nn.Linear(4 * config.dim, config.dim, bias=False),
        nn.Dropout(config.mlp_dropout),
    )


def token_of(width: int, dim: int) -> nn.Sequential:
    """A vector of any width → one token."""
    return nn.Sequential(nn.Linear(width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class EncoderLayer(nn.Module):
    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.dim, bias=False)
        self.feed_forward = feed_forward(config)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class DecoderLayer(nn.Module):
    """Causal self-attention and feed-forward under AdaLN (shift + x·scale, gate); cross-attention without."""

    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = Attention(config)
        self.cross_norm = nn.LayerNorm(config.dim)
        self.cross_attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.dim, bias=False)
        self.feed_forward = feed_forward(config)

    def forward(
        self,
        x: Float[Tensor, "B R K D"],
        keys_values: tuple[Tensor, Tensor],
        modulation: Float[Tensor, "*BR 6D"],
        *,
        mask: Tensor | None,
    ) -> Float[Tensor, "B R K D"]:
        draws = x.shape[:2]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation[..., None, :].chunk(6, -1)
        y = shift + self.attention_norm(x) * scale
        x = x + gate * self.attention(y.flatten(0, 1), causal=True).unflatten(0, draws)
        # All draws of a sample look at one context: to the cross-attention they are just more queries.
        y = self.cross_attention(self.cross_norm(x).flatten(1, 2), keys_values, mask=mask)
        x = x + y.unflatten(1, x.shape[1:3])
        y = ff_shift + self.feed_forward_norm(x) * ff_scale
        return x + ff_gate * self.feed_forward(y)


class SigmaEmbedding(nn.Module):
    """ln σ / 4 → sinusoid (sines, then cosines) → Linear → Mish → Linear."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Mish(), nn.Linear(2 * dim, dim))

    def forward(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "... D"]:
        angle = (sigma.log() / 4)[..., None] * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))


class ActionDenoiser(nn.Module):
    """The network inside the preconditioning: context and noisy actions → A numbers per action.

    state_dim: S, the numbers of the robot's state, which is then one more token; None: no such token.
    """

    def __init__(
        self,
        config: ActionHeadConfig,
        *,
        sentence_dim: int,
        video_dim: int,
        latent_action_dim: int,
        action_dim: int,
        chunk: int,
        state_dim: int | None = None,
    ):
        super().__init__()
        dim = config.dim
        self.config = config
        self.embed_sentence = token_of(sentence_dim, dim)
        self.embed_state = token_of(state_dim, dim) if state_dim else None
        self.embed_video = nn.Linear(video_dim, dim)
        self.embed_latent_action = nn.Linear(latent_action_dim, dim)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(dim, bias=False)
        self.embed_sigma = SigmaEmbedding(dim)
        self.embed_action = nn.Linear(action_dim, dim)
        positions = nn.Parameter(0.3 * torch.randn(chunk, dim))
        self.action_positions = positions if config.cross_attention == "full" else None
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim, bias=False)
        self.predict = nn.Linear(dim, action_dim)
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.02 * math.sqrt(384 / dim))  # published: 0.02 at width 384
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if config.identity_modulation:
            for linear in linears:  # what passes through keeps its size, for training from scratch
                nn.init.xavier_uniform_(linear.weight)
            for layer in self.decoder:
                _, scale, gate, _, ff_scale, ff_gate = layer.modulation[1].bias.data.chunk(6)
                for part in (scale, gate, ff_scale, ff_gate):
                    part.fill_(1.0)

    def encode(
        self,
        *,
        sentence: Float[Tensor, "B P"],
        video_tokens: Float[Tensor, "B N Dv"],
        latent_actions: Float[Tensor, "B Q Dg"],
        state: Float[Tensor, "B S"] | None = None,
    ) -> Memory:
        """What the decoder looks at, computed once per chunk."""
        tokens = [self.embed_sentence(sentence)[:, None]]
        if self.embed_state is not None:
            tokens.append(self.embed_state(state)[:, None])
        tokens += [self.embed_video(video_tokens), self.embed_latent_action(latent_actions)]
        x = torch.cat(tokens, dim=1)
        for layer in self.encoder:
            x = layer(x)
        context = self.encoder_norm(x)
        return [layer.cross_attention.keys_values(context) for layer in self.decoder]

    def noise_levels(self, sigma: Float[Tensor, "..."]) -> NoiseLevels:
        """What `decode` needs to know of σ; for all levels of a schedule at once."""
        embedded = self.embed_sigma(sigma)
        return [layer.modulation(embedded) for layer in self.decoder]

    def decode(
        self, memory: Memory, noisy: Float[Tensor, "... K A"], levels: NoiseLevels
    ) -> Float[Tensor, "... K A"]:
        """One denoising step of noisy actions [B, K, A], or [B, R, K, A]: R draws share one context.

        `levels` of σ [B] or [B, R], or of one σ for all.
        """
        if noisy.ndim == 3:
            return self.decode(memory, noisy[:, None], [level[..., None, :] for level in levels])[:, 0]
        x = self.embed_action(noisy)
        if self.action_positions is not None:
            x = x + self.action_positions
        mask = None
        if self.config.cross_attention == "causal":  # action i sees context tokens 0 … i
            tokens = memory[0][0].shape[2]
            mask = torch.ones(x.shape[2], tokens, dtype=torch.bool, device=x.device).tril()
            mask = mask.repeat(x.shape[1], 1)
        for layer, keys_values, modulation in zip(self.decoder, memory, levels, strict=True):
            x = layer(x, keys_values, modulation, mask=mask)
        return self.predict(self.decoder_norm(x))
