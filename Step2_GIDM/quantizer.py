"""Vector quantizer with a codebook whose unused entries are restarted (van den Oord et al. 2017)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from defi.engine.data import stream
from defi.processes import full_tensor, shard_like

RECENT = 256  # encoder vectors kept for restarts


@dataclass
class Quantized:
    """What a quantizer returns for vectors z_e [B, Q, Z].

    `vectors` are the nearest codes e, with the gradient of z_e (straight-through).
    """

    vectors: Float[Tensor, "B Q Z"]
    indices: Int[Tensor, "B Q"]
    counts: Int[Tensor, " N"]  # how often each code was taken; while training, over all processes
    codebook_loss: Float[Tensor, ""]  # mean ‖sg(z_e) − e‖², moves the codes
    commitment_loss: Float[Tensor, ""]  # mean ‖z_e − sg(e)‖², moves the encoder


class VectorQuantizer(nn.Module):
    """Nearest code by L2 distance. While training, counts which codes are used (over all processes).

    `usage` counts since the last restart; `recent` are the latest encoder vectors, newest last, in the order
    of the stream of samples (`defi.engine.data.StepOrder`). Both depend on that stream alone, however it is
    split into processes and micro-batches, if `restart_unused` is called between steps only. They are
    buffers, so they are saved and a resumed run restarts the same codes as an uninterrupted one.
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
            counts = torch.bincount(indices.flatten(), minlength=len(self.codebook))
            if self.training:
                self._count(z.detach(), counts)
            return Quantized(
                vectors=z + (codes - z).detach(),
                indices=indices,
                counts=counts,
                codebook_loss=F.mse_loss(codes, z.detach()),
                commitment_loss=F.mse_loss(z, codes.detach()),
            )

    @torch.no_grad()
    def _count(self, z: Float[Tensor, "B Q Z"], counts: Int[Tensor, " N"]) -> None:
        """Take note of a micro-batch; `counts` become those of all processes."""
        if dist.is_initialized():
            dist.all_reduce(counts)
            shares = [torch.empty_like(z) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, z.contiguous())
            z = torch.stack(shares, dim=1).flatten(0, 1)  # the processes take samples in turn
        self.usage += counts
        self.recent.copy_(torch.cat([self.recent, z.flatten(0, 1)])[-RECENT:])

    @torch.no_grad()
    def restart_unused(self, onto: str = "vectors") -> int:
        """Move every code unused since the last call; returns how many were. Counting starts again.

        onto: recent `vectors` of the encoder, drawn from those since the last call, or `codes`, drawn from
            the codebook. The draw depends on the number of earlier restarts only and all processes hold the
            same vectors, so they end with the same codebook.
        """
        dead = (self.usage == 0).nonzero().flatten()
        counted = int(self.usage.sum())
        if counted and len(dead) and self.codebook.requires_grad:
            codebook = full_tensor(self.codebook).detach().clone()
            source = codebook if onto == "codes" else self.recent.flip(0)[: min(counted, RECENT)]
            draw = torch.from_numpy(stream("restarted codes", int(self.restarts)).permutation(len(source)))
            draw = draw[torch.arange(len(dead)) % len(draw)]  # with more dead codes than vectors, again
            codebook[dead] = source[draw.to(source.device)].to(codebook.dtype)
            self.codebook.copy_(shard_like(codebook, self.codebook))
            self.restarts += 1
        self.usage.zero_()
        return len(dead) if counted else 0


def perplexity(counts: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """exp of the entropy of the code histogram: 1 if one code takes all, N if all are equally used."""
    share = counts / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp()
