"""GIDM branch: latent actions read off the imagined future instead of off two real frames.

DeFI (arXiv 2604.16391): stage 2's encoder and codebook, fed with the static view's features at two frames.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from Step2_GIDM.latent_action import LatentActions, LatentActionSizes, LatentActionTokenizer


class GIDMBranch(nn.Module):
    """Features at two imagined frames → latent actions. No DINO, no decoder; the rest is finetuned.

    `frames` are the two frame numbers.
    """

    def __init__(self, sizes: LatentActionSizes, *, feature_channels: int, frames: Sequence[int]) -> None:
        super().__init__()
        width = sizes.patch_width
        self.frames = list(frames)
        self.project = nn.Sequential(nn.Linear(feature_channels, width), nn.GELU(), nn.Linear(width, width))
        self.frame_embedding = nn.Parameter(torch.randn(len(self.frames), 1, width))
        self.tokenizer = LatentActionTokenizer(sizes)

    def forward(
        self,
        features: Float[Tensor, "B F L C"],
        states: Float[Tensor, "B T X"] | None,
        text_mask: Bool[Tensor, "B T"] | None,
    ) -> LatentActions:
        """`features` of the static view at all frames; `states` and `text_mask` from the T5 tower."""
        seen = torch.stack([features[:, frame] for frame in self.frames], dim=1)
        patches = self.project(seen) + self.frame_embedding
        return self.tokenizer(patches, states, text_mask)
