"""Vector quantizer with a codebook whose unused entries are restarted (van den Oord et al. 2017)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

RECENT = 256


@dataclass
class Quantized:
    """What a quantizer returns for vectors z_e [B, Q, Z].

    `vectors` are the nearest codes e, with the gradient of z_e (straight-through).
    """

    vectors: Float[Tensor, "B Q Z"]
    indices: Int[Tensor, "B Q"]
    codebook_loss: Float[Tensor, ""]  # mean ‖sg(z_e) − e‖², moves the codes
    commitment_loss: Float[Tensor, ""]  # mean ‖z_e − sg(e)‖², moves the encoder


class VectorQuantizer(nn.Module):
    """Nearest code by L2 distance. While training, counts which codes are used (over all processes).

    The counts and the latest encoder vectors are buffers, so they are saved and a resumed run restarts the
    same codes as an uninterrupted one.
    """

    codebook: Float[Tensor, "N Z"]
    usage: Int[Tensor, " N"]
    recent: Float[Tensor, "R Z"]

    def __init__(self, codes: int, width: int, *, trainable: bool = True) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codes, width).uniform_(-1 / codes, 1 / codes), trainable)
        self.register_buffer("usage", torch.zeros(codes, dtype=torch.long))
        self.register_buffer("recent", torch.zeros(RECENT, width))
        self.register_buffer("restarts", torch.zeros((), dtype=torch.long))

    def forward(self, vectors: Float[Tensor, "B Q Z"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            z = vectors.float()
            indices = torch.cdist(z.detach().flatten(0, 1), self.codebook.detach()).argmin(-1)
            indices = indices.unflatten(0, z.shape[:2])
            codes = self.codebook[indices]
            if self.training:
                self._count(z.detach(), indices)
            return Quantized(
                vectors=z + (codes - z).detach(),
                indices=indices,
                codebook_loss=F.mse_loss(codes, z.detach()),
                commitment_loss=F.mse_loss(z, codes.detach()),
            )

    @torch.no_grad()
    def _count(self, z: Float[Tensor, "B Q Z"], indices: Int[Tensor, "B Q"]) -> None:
        counts = torch.bincount(indices.flatten(), minlength=len(self.codebook))
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.usage += counts
        # Evenly spread over the batch of all processes, which share its samples in turn (`StepOrder`): a few
        # large samples do not fill the store, and every process keeps the same vectors.
        if dist.is_initialized():
            shares = [torch.empty_like(z) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, z.contiguous())
            z = torch.stack(shares, dim=1).flatten(0, 1)
        flat = z.flatten(0, 1)
        pick = torch.linspace(0, len(flat) - 1, RECENT, device=z.device).round().long()
        self.recent.copy_(flat[pick])

    @torch.no_grad()
    def restart_unused(self) -> int:
        """Move every code unused since the last call onto a recent encoder vector; returns how many were.

        The draw depends on the number of earlier restarts only and all processes hold the same vectors, so
        they end with the same codebook. Counting starts anew.
        """
        dead = (self.usage == 0).nonzero().flatten()
        used = bool(self.usage.any())
        if used and len(dead) and self.codebook.requires_grad:
            generator = torch.Generator().manual_seed(int(self.restarts))
            draw = torch.randperm(RECENT, generator=generator)[: len(dead)]
            self.codebook[dead] = self.recent[draw.to(self.recent.device)].to(self.codebook.dtype)
            self.restarts += 1
        self.usage.zero_()
        return len(dead) if used else 0


def perplexity(counts: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """exp of the entropy of the code histogram: 1 if one code takes all, N if all are equally used."""
    share = counts / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp()
