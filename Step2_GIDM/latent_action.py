"""From the tokens of two frames to a few discrete latent actions, and back to the later frame's tokens.

The tokenizer is shared by stage 2 (tokens: DINOv2 patches of two frames) and stage 3 (tokens: features of the
imagined video). B batch, L patch tokens, T text tokens, Q latent-action tokens, Z code width, D width,
C width of the patch tokens, X width of the text states.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from Step2_GIDM.blocks import SpatialBlock, SpatioTemporalBlock, input_projection, sinusoid
from Step2_GIDM.quantizer import Quantized, VectorQuantizer


@dataclass
class LatentActionSizes:
    """Sizes of encoder and codebook. The defaults are the paper's."""

    patch_width: int = 768  # C: DINOv2's, and what stage 3 projects its features to
    text_width: int | None = 768  # X, T5's; None: no language
    width: int = 768  # D
    blocks: int = 12
    heads: int = 12
    queries: int = 4  # Q
    codes: int = 16
    code_width: int = 128  # Z
    frozen_codes: int | None = None  # the first stage's codebook beside the new one: the controllable variant


@dataclass
class LatentActions:
    """The motion between two frames, as Q codes."""

    tokens: Float[Tensor, "B Q D"]  # quantized vectors, projected to D: what decoder and policy read
    vectors: Float[Tensor, "B Q Z"]  # the encoder's, before quantization
    codes: Quantized  # nearest codes: vectors, indices [B, Q], losses
    text: Float[Tensor, "B T D"] | None = None  # projected text, which the decoder reads too
    rest: "LatentActions | None" = None  # controllable variant: what the frozen codebook explains

    @property
    def indices(self) -> Int[Tensor, "B Q"]:
        return self.codes.indices

    def all_tokens(self) -> Float[Tensor, "B Q D"]:
        """What the decoder reads: the tokens of both codebooks where there are two."""
        return self.tokens if self.rest is None else torch.cat([self.tokens, self.rest.tokens], dim=1)


class LatentActionEncoder(nn.Module):
    """Learned queries beside the patches of each frame, and text, through spatio-temporal blocks.

    One set of queries, or two in the controllable variant (the new set stands first). The later frame's
    queries are the answer: attention over time is causal, so only they have seen both frames.

    mixed_text_masks: repeat the published fault that in training, of the B·F rows, row n gets the text mask
    of sample n mod B, so that one sample's padding hides or shows another's text.
    """

    mixed_text_masks = False

    def __init__(self, sizes: LatentActionSizes) -> None:
        super().__init__()
        self.sizes = sizes
        query_sets = 1 if sizes.frozen_codes is None else 2
        self.queries = nn.ParameterList(
            torch.empty(sizes.queries, sizes.patch_width).uniform_(-1, 1) for _ in range(query_sets)
        )
        self.embed = input_projection(sizes.patch_width, sizes.width)
        self.embed_text = None if sizes.text_width is None else nn.Linear(sizes.text_width, sizes.width)
        self.blocks = nn.ModuleList(
            SpatioTemporalBlock(sizes.width, sizes.heads) for _ in range(sizes.blocks)
        )
        self.to_code = nn.ModuleList(nn.Linear(sizes.width, sizes.code_width) for _ in range(query_sets))

    def forward(
        self,
        patches: Float[Tensor, "B 2 L C"],
        text: Float[Tensor, "B T D"] | None = None,
        text_mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B Q Z"], ...]:
        """One [B, Q, Z] per query set. `text` is projected already; its mask is true on real tokens."""
        batch, frames = patches.shape[:2]
        queries = torch.cat(list(self.queries)).expand(batch, frames, -1, -1)
        x = self.embed(torch.cat([queries.to(patches.dtype), patches], dim=2))
        x = x + sinusoid(x.shape[2], x.shape[3], device=x.device).to(x.dtype)
        mask = None
        if text is not None:
            mask = text_key_mask(x.shape[2], text_mask)
            if mask is not None:
                mixed = self.training and self.mixed_text_masks
                mask = mask.repeat(frames, 1) if mixed else mask.repeat_interleave(frames, dim=0)
            x = torch.cat([x, text[:, None].expand(-1, frames, -1, -1).to(x.dtype)], dim=2)
        for block in self.blocks:
            x = block(x, mask)
        later = x[:, -1, : queries.shape[2]].split(self.sizes.queries, dim=1)
        return tuple(project(z) for project, z in zip(self.to_code, later))


def text_key_mask(tokens: int, text_mask: Bool[Tensor, "B T"] | None) -> Bool[Tensor, "B S"] | None:
    """Key mask for `tokens` tokens that are always seen, then text that is seen where its mask is true."""
    if text_mask is None:
        return None
    return torch.cat([text_mask.new_ones(len(text_mask), tokens), text_mask], dim=1)


class LatentActionTokenizer(nn.Module):
    """Encoder, codebook and projection of the codes: everything of stage 2 that stage 3 keeps.

    With `frozen_codes` a second query set and codebook stand beside them: the first stage's, frozen.
    """

    def __init__(self, sizes: LatentActionSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = LatentActionEncoder(sizes)
        self.quantizer = VectorQuantizer(sizes.codes, sizes.code_width)
        self.from_code = nn.Linear(sizes.code_width, sizes.width)
        if sizes.frozen_codes is not None:
            self.frozen_quantizer = VectorQuantizer(sizes.frozen_codes, sizes.code_width, trainable=False)
            self.from_frozen_code = nn.Linear(sizes.code_width, sizes.width)

    def forward(
        self,
        patches: Float[Tensor, "B 2 L C"],
        states: Float[Tensor, "B T X"] | None = None,
        text_mask: Bool[Tensor, "B T"] | None = None,
    ) -> LatentActions:
        """`states` are T5's last hidden states, not projected; None where there is no language."""
        text = None if states is None else self.encoder.embed_text(states)
        vectors, *frozen = self.encoder(patches, text, text_mask)
        actions = self._quantize(vectors, self.quantizer, self.from_code)
        rest = self._quantize(frozen[0], self.frozen_quantizer, self.from_frozen_code) if frozen else None
        return replace(actions, text=text, rest=rest)

    @staticmethod
    def _quantize(
        vectors: Float[Tensor, "B Q Z"], quantizer: VectorQuantizer, up: nn.Linear
    ) -> LatentActions:
        codes = quantizer(vectors)
        return LatentActions(up(codes.vectors.to(vectors.dtype)), vectors, codes)


class FutureDecoder(nn.Module):
    """The later frame's patch tokens from the earlier frame's, the latent action and text."""

    def __init__(self, sizes: LatentActionSizes, *, blocks: int) -> None:
        super().__init__()
        self.embed_patches = nn.Linear(sizes.patch_width, sizes.width)
        self.embed = input_projection(sizes.width, sizes.width)
        self.blocks = nn.ModuleList(SpatialBlock(sizes.width, sizes.heads) for _ in range(blocks))
        self.out = nn.Linear(sizes.width, sizes.patch_width)

    def forward(
        self,
        now: Float[Tensor, "B L C"],
        actions: Float[Tensor, "B Q D"],
        text: Float[Tensor, "B T D"] | None = None,
        text_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B L C"]:
        x = self.embed(torch.cat([actions, self.embed_patches(now)], dim=1))
        x = x + sinusoid(x.shape[1], x.shape[2], device=x.device).to(x.dtype)
        mask = None
        if text is not None:
            mask = text_key_mask(x.shape[1], text_mask)
            x = torch.cat([x, text.to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(x[:, actions.shape[1] : actions.shape[1] + now.shape[1]])


@dataclass
class LatentActionOutput:
    """Reconstruction of the later frame's patch tokens, and the loss terms."""

    actions: LatentActions
    predicted: Float[Tensor, "B L C"]
    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]


class LatentActionModel(nn.Module):
    """Tokenizer and decoder: the trained part of stage 2, between frozen patch features and frozen text.

    loss = MSE + ‖sg(z_e) − e‖² + β·‖z_e − sg(e)‖² (means; paper section "General Inverse Dynamics Model").
    """

    def __init__(self, sizes: LatentActionSizes, *, decoder_blocks: int, commitment: float = 0.25) -> None:
        super().__init__()
        self.commitment = commitment
        self.tokenizer = LatentActionTokenizer(sizes)
        self.decoder = FutureDecoder(sizes, blocks=decoder_blocks)

    def forward(
        self,
        patches: Float[Tensor, "B 2 L C"],
        states: Float[Tensor, "B T X"] | None = None,
        text_mask: Bool[Tensor, "B T"] | None = None,
    ) -> LatentActionOutput:
        actions = self.tokenizer(patches, states, text_mask)
        predicted = self.decoder(patches[:, 0], actions.all_tokens(), actions.text, text_mask)
        mse = F.mse_loss(predicted.float(), patches[:, 1].float())
        loss = mse
        for part in (actions,) if actions.rest is None else (actions, actions.rest):
            loss = loss + part.codes.codebook_loss + self.commitment * part.codes.commitment_loss
        return LatentActionOutput(actions, predicted, loss, mse)
