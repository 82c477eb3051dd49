"""GFDM: Stable Video Diffusion conditioned on text, which imagines the next F frames (paper section 3.2)."""

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from defi.text import CLIPText
from Step1_GFDM.config import GFDMConfig, VAESizes
from Step1_GFDM.unet import up_block_features


def build_scheduler() -> EulerDiscreteScheduler:
    """SVD's sampling schedule: v-prediction, Karras sigmas 0.002…700, continuous timesteps ln(sigma)/4."""
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
    levels = len(config.unet.block_out_channels)
    return UNetSpatioTemporalConditionModel(
        sample_size=config.latent_size,
        in_channels=2 * config.vae.latent_channels,
        out_channels=config.vae.latent_channels,
        down_block_types=["CrossAttnDownBlockSpatioTemporal"] * (levels - 1) + ["DownBlockSpatioTemporal"],
        up_block_types=["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * (levels - 1),
        block_out_channels=config.unet.block_out_channels,
        layers_per_block=config.unet.layers_per_block,
        num_attention_heads=config.unet.num_attention_heads,
        cross_attention_dim=2 * text_width,
        addition_time_embed_dim=config.unet.addition_time_embed_dim,
        projection_class_embeddings_input_dim=3 * config.unet.addition_time_embed_dim,
        num_frames=config.frames,
    )


class GFDM(nn.Module):
    """Video diffusion from one image latent and an instruction; only the UNet is trained.

    Latents are "scaled" where their deviation is about 1 (VAE mode × scaling factor, as in data sets);
    the image condition enters the UNet unscaled, as in SVD.
    """

    def __init__(
        self,
        config: GFDMConfig,
        *,
        unet: UNetSpatioTemporalConditionModel,
        vae: AutoencoderKLTemporalDecoder,
        scheduler: EulerDiscreteScheduler,
        clip: CLIPText,
    ) -> None:
        super().__init__()
        self.config = config
        self.unet = unet
        self.vae = vae.eval().requires_grad_(False)
        self.scheduler = scheduler
        self.clip = clip

    @classmethod
    def from_config(cls, config: GFDMConfig, vae: AutoencoderKLTemporalDecoder | None = None) -> "GFDM":
        """A model with random weights (and the given VAE, if any)."""
        clip = CLIPText.from_config(config.clip)
        return cls(
            config,
            unet=build_unet(config, clip.width),
            vae=vae or build_vae(config.vae, config.image_size),
            scheduler=build_scheduler(),
            clip=clip,
        )

    def train(self, mode: bool = True) -> "GFDM":
        super().train(mode)
        self.vae.eval()
        return self

    @property
    def scaling(self) -> float:
        """VAE mode × scaling = scaled latent."""
        return self.vae.config.scaling_factor

    @property
    def feature_channels(self) -> int:
        """C of `features`: widths of up blocks 0 and 1."""
        return sum(self.unet.config.block_out_channels[:-3:-1])

    @property
    def feature_tokens(self) -> int:
        """L of `features`: positions of up block 1, which ends two doublings above the lowest level."""
        return (self.config.latent_size // 2 ** (len(self.unet.config.block_out_channels) - 3)) ** 2

    def noise(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "N F 4 h w"]:
        """Standard normal noise for `count` clips, drawn on the generator's device."""
        size = self.config.latent_size
        shape = (count, self.config.frames, self.config.vae.latent_channels, size, size)
        device = generator.device if generator is not None else self.unet.device
        return torch.randn(shape, generator=generator, device=device).to(self.unet.device)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "N T D2"]:
        """CLIP token states concatenated with themselves."""
        states = self.clip.tokens(texts)
        return torch.cat([states, states], dim=-1)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 4 h w"]:
        """Scaled latents (mode of the posterior) of images in [-1, 1]."""
        return self.vae.encode(images).latent_dist.mode() * self.scaling

    @torch.no_grad()
    def decode_latents(self, latents: Float[Tensor, "N F 4 h w"]) -> Float[Tensor, "N F 3 H W"]:
        """Frames in [-1, 1] of scaled latents."""
        clips, frames = latents.shape[:2]
        images = self.vae.decode(latents.flatten(0, 1) / self.scaling, num_frames=frames).sample
        return images.clamp(-1, 1).unflatten(0, (clips, frames))

    def time_ids(
        self, count: int, fps: float, motion: float, noise_aug: float | Tensor
    ) -> Float[Tensor, "N 3"]:
        """Added time ids [fps, motion bucket, strength of the noise on the condition]."""
        ids = torch.tensor([[fps, motion, 0.0]], device=self.unet.device).repeat(count, 1)
        ids[:, 2] = noise_aug
        return ids

    def denoising_loss(
        self,
        latents: Float[Tensor, "B F 4 h w"],
        text: Float[Tensor, "B T D2"],
        *,
        condition: Float[Tensor, "B 4 h w"],
        noise_aug: float | Float[Tensor, " B"] = 0.0,
        noise: Float[Tensor, "B F 4 h w"],
        normal: Float[Tensor, "B 1 1 1 1"],
    ) -> Float[Tensor, ""]:
        """EDM loss with sigma_data 1 (Karras et al. 2022, table 1), v-prediction preconditioning as in SVD.

        latents and condition are scaled; normal is the standard normal draw behind each sample's sigma.
        """
        edm = self.config.diffusion
        sigma = torch.exp(edm.sigma_mean + edm.sigma_std * normal)
        noisy = latents + sigma * noise
        image = (condition / self.scaling).unsqueeze(1).expand_as(latents)
        prediction = self.unet(
            torch.cat([noisy / (sigma**2 + 1).sqrt(), image], dim=2),
            sigma.log().flatten() / 4,
            encoder_hidden_states=text,
            added_time_ids=self.time_ids(len(latents), edm.fps, edm.motion_bucket, noise_aug),
        ).sample
        denoised = -sigma / (sigma**2 + 1).sqrt() * prediction.float() + noisy / (sigma**2 + 1)
        return ((sigma**2 + 1) / sigma**2 * (denoised - latents) ** 2).mean()

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Loss of a batch: `text` (list of str) and `latents` [B, F, 4, h, w] (scaled), or else `frames`
        [B, F, 3, H, W] in [-1, 1], whose first one then gets noise of strength exp(N(-3, 0.5))."""
        text = self.encode_text(batch["text"])
        keep = torch.rand(len(text), 1, 1, device=text.device) >= self.config.diffusion.text_dropout
        if "latents" in batch:
            latents, noise_aug = batch["latents"], 0.0
            condition = latents[:, 0]
        else:
            frames = batch["frames"]
            latents = self.encode_images(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
            noise_aug = torch.exp(0.5 * torch.randn(len(frames), device=frames.device) - 3)
            image = frames[:, 0]
            condition = self.encode_images(image + noise_aug[:, None, None, None] * torch.randn_like(image))
        loss = self.denoising_loss(
            latents,
            text * keep,
            condition=condition,
            noise_aug=noise_aug,
            noise=torch.randn_like(latents),
            normal=torch.randn(len(latents), 1, 1, 1, 1, device=latents.device),
        )
        return {"loss": loss}

    @torch.no_grad()
    def generate(
        self,
        latents: Float[Tensor, "N 4 h w"],
        text: Float[Tensor, "N T D2"],
        *,
        noise: Float[Tensor, "N F 4 h w"],
        steps: int | None = None,
    ) -> Float[Tensor, "N F 4 h w"]:
        """Scaled latents of the imagined clips, by Euler steps with classifier-free guidance.

        latents: the scaled image condition. text: `encode_text`. Guidance rises linearly over the frames;
        the unconditional branch has zero text and a zero image latent.
        """
        sampling = self.config.sampling
        image = (latents / self.scaling).unsqueeze(1).expand_as(noise)
        image = torch.cat([torch.zeros_like(image), image])
        text = torch.cat([torch.zeros_like(text), text])
        edm = self.config.diffusion
        time_ids = self.time_ids(len(text), edm.fps, edm.motion_bucket, sampling.noise_aug)
        guidance = torch.linspace(sampling.min_guidance, sampling.max_guidance, noise.shape[1])
        guidance = guidance.to(noise.device)[:, None, None, None]
        self.scheduler.set_timesteps(steps or sampling.steps, device=noise.device)
        sample = noise * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(torch.cat([sample, sample]), timestep)
            prediction = self.unet(
                torch.cat([scaled, image], dim=2),
                timestep,
                encoder_hidden_states=text,
                added_time_ids=time_ids,
            ).sample
            without, conditioned = prediction.chunk(2)
            guided = without + guidance * (conditioned - without)
            sample = self.scheduler.step(guided, timestep, sample).prev_sample
        return sample

    def features(
        self,
        latents: Float[Tensor, "N 4 h w"],
        texts: list[str],
        *,
        noise: Float[Tensor, "N F 4 h w"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "N F L C"]:
        """Features of the imagined future of each image: one partial UNet pass at the first sampling step.

        latents: scaled. noise: standard normal, drawn from `generator` where it is not given.
        """
        noise = self.noise(len(latents), generator) if noise is None else noise
        maps = self.feature_maps(latents, self.encode_text(texts), noise=noise)
        return maps.flatten(3).transpose(2, 3)

    @torch.no_grad()
    def feature_maps(
        self,
        latents: Float[Tensor, "N 4 h w"],
        text: Float[Tensor, "N T D2"],
        *,
        noise: Float[Tensor, "N F 4 h w"],
        step: int = 1,
    ) -> Float[Tensor, "N F C h2 w2"]:
        """`features` as maps, at the `step`-th sampling step; those before it run in full, unguided."""
        wanted = self.config.features
        time_ids = self.time_ids(len(latents), wanted.fps, wanted.motion_bucket, 0.0)
        image = (latents / self.scaling).unsqueeze(1).expand_as(noise)
        self.scheduler.set_timesteps(wanted.steps, device=noise.device)
        sample = noise * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps[: step - 1]:
            scaled = self.scheduler.scale_model_input(sample, timestep)
            prediction = self.unet(
                torch.cat([scaled, image], dim=2),
                timestep,
                encoder_hidden_states=text,
                added_time_ids=time_ids,
            ).sample
            sample = self.scheduler.step(prediction, timestep, sample).prev_sample
        timestep = self.scheduler.timesteps[step - 1]
        scaled = self.scheduler.scale_model_input(sample, timestep)
        return up_block_features(
            self.unet, torch.cat([scaled, image], dim=2), timestep.expand(len(latents)), text, time_ids
        )
