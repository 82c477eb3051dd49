"""The temporal VAE of presets without pretrained weights: trained first, by a job of its own."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder
from jaxtyping import Float
from torch import Tensor

from defi.engine.checkpoint import find_weights
from defi.engine.data import SampleNoise
from defi.engine.model import StageModel
from defi.engine.weights import COPY_AGAIN
from defi.errors import reading
from defi.files import read_json
from Step1_GFDM import pipeline
from Step1_GFDM.config import VAESizes

MEASURED = "latents.json"  # their deviation, and in how many batches: for an exact resume
MEMORY = 20  # batches over which the deviation of the latents is averaged


@dataclass
class VAEConfig:
    """image_size: H = W in pixels. kl: weight of the KL divergence per latent element."""

    image_size: int = 256
    sizes: VAESizes = field(default_factory=VAESizes)
    kl: float = 1e-4

    def fake_batch(self, batch_size: int, frames: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Valid training input: smooth random frames [B, F, 3, H, W] in [-1, 1] and sample seeds."""
        random = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch_size * frames, 3, 8, 8, generator=random) * 2 - 1
        images = F.interpolate(coarse, (self.image_size, self.image_size), mode="bilinear")
        return {"frames": images.unflatten(0, (batch_size, frames)), "seed": torch.arange(batch_size) + seed}


class VideoVAE(StageModel):
    """Trains `AutoencoderKLTemporalDecoder`: reconstruction (L1 + MSE) and a small KL divergence.

    The scaling factor 1/deviation of the latents, which the diffusion model needs, follows the training
    (`deviation`) and is part of the saved configuration.
    """

    stage = "vae"
    config_class = VAEConfig

    def __init__(self, config: VAEConfig, vae: AutoencoderKLTemporalDecoder) -> None:
        super().__init__()
        self.config, self.vae = config, vae
        middle = vae.decoder.mid_block  # with one layer per block its attention exists but is never called
        middle.attentions[len(middle.resnets) - 1 :].requires_grad_(False)
        self.register_buffer("deviation", torch.tensor(1 / vae.config.scaling_factor), persistent=False)
        self.register_buffer("measured", torch.zeros((), dtype=torch.long), persistent=False)  # batches in it

    @classmethod
    def from_config(cls, config: VAEConfig) -> "VideoVAE":
        """A VAE with random weights."""
        return cls(config, pipeline.build_vae(config.sizes, config.image_size))

    def save_pretrained(self, folder: Path) -> None:
        """Write the VAE as diffusers does (`load_vae`), and what an exact resume needs besides."""
        self.vae.register_to_config(scaling_factor=1 / self.deviation.item())
        self.vae.save_pretrained(folder)
        measured = {"deviation": self.deviation.item(), "measured": int(self.measured)}
        (folder / MEASURED).write_text(json.dumps(measured))

    def load_weights(self, folder: Path) -> None:
        file = Path(folder) / MEASURED
        pipeline.load_network(self.vae, Path(folder))
        with reading(file, COPY_AGAIN):
            values = read_json(file, COPY_AGAIN)
            self.deviation.fill_(values["deviation"])
            self.measured.fill_(values["measured"])

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Loss of `frames` [B, F, 3, H, W] in [-1, 1]: short clips, so that the decoder learns time too."""
        frames = batch["frames"]
        images = frames.flatten(0, 1)
        posterior = self.vae.encode(images).latent_dist
        mean, deviation = posterior.mean, posterior.std
        noise = SampleNoise(batch["seed"], mean.device).normal("latents", frames.shape[1], *mean.shape[1:])
        decoded = self.vae.decode(mean + deviation * noise.flatten(0, 1), num_frames=frames.shape[1]).sample
        l1, mse = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        kl = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).mean()
        if self.training:
            self._measure(mean.detach())
        return {"loss": l1 + mse + self.config.kl * kl, "mse": mse, "kl": kl, "deviation": mean.std()}

    @torch.no_grad()
    def _measure(self, latents: Float[Tensor, "N 4 h w"]) -> None:
        """Let the deviation follow that of these latents, taken over all processes."""
        moments = torch.stack([latents.double().mean(), latents.double().square().mean()])
        if dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        deviation = (moments[1] - moments[0] ** 2).clamp(min=0).sqrt().float()
        self.measured += 1
        self.deviation.lerp_(deviation, 1 / self.measured.clamp(max=MEMORY))

    @torch.no_grad()
    def reconstruct(self, frames: Float[Tensor, "B F 3 H W"]) -> Float[Tensor, "B F 3 H W"]:
        """Frames through the latents' mode and back, in [-1, 1]."""
        codes = self.vae.encode(frames.flatten(0, 1)).latent_dist.mode()
        images = self.vae.decode(codes, num_frames=frames.shape[1]).sample
        return images.clamp(-1, 1).unflatten(0, frames.shape[:2])


def load_vae(path: Path | str) -> AutoencoderKLTemporalDecoder:
    """The VAE of a run of `Step1_GFDM.train_vae` (its output folder or a checkpoint in it), frozen."""
    return pipeline.load_part(AutoencoderKLTemporalDecoder, find_weights(path, "vae")).requires_grad_(False)
