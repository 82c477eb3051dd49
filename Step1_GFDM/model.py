"""GFDM: Stable Video Diffusion conditioned on text, which imagines the next F frames (paper section 3.2)."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from jaxtyping import Float
from torch import Tensor

from defi.config import typed
from defi.engine.data import SampleNoise, sample_seeds
from defi.engine.model import StageModel
from defi.files import check_sizes, read_json
from defi.processes import print_once
from defi.text import CLIPText
from Step1_GFDM import pipeline
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.unet import up_block_features

CONFIG = "gfdm.json"
Video = Float[Tensor, "N F 4 h w"]  # latents of F frames
Picture = Float[Tensor, "N 4 h w"]  # latents of one
Text = Float[Tensor, "N T D2"]  # CLIP token states, twice


class GFDM(StageModel):
    """Video diffusion from one image latent and an instruction; only the UNet is trained.

    Latents are "scaled" where their deviation is about 1 (VAE mode × scaling factor, as in data sets);
    the image condition enters the UNet unscaled, as in SVD.
    """

    stage = "gfdm"
    config_class = GFDMConfig
    frozen = ("vae", "clip")
    blocks = (SpatioTemporalResBlock, TransformerSpatioTemporalModel)

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
        self.config, self.scheduler = config, scheduler
        self.unet, self.vae, self.clip = unet, vae, clip
        self.freeze()

    @classmethod
    def from_config(cls, config: GFDMConfig, vae: AutoencoderKLTemporalDecoder | None = None) -> "GFDM":
        """A new model: random weights and the given VAE, or the parts of the folder `config.pretrained`."""
        clip = CLIPText.from_config(config.clip)
        if config.pretrained is not None:
            parts, sizes = pipeline.load_foreign(Path(config.pretrained), clip.width)
            return cls(replace(config, **sizes), **parts, clip=clip)
        vae = vae or pipeline.build_vae(config.vae, config.image_size)
        unet = pipeline.build_unet(config, clip.width)
        return cls(config, unet=unet, vae=vae, scheduler=pipeline.build_scheduler(), clip=clip)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "GFDM":
        """The model that `save_pretrained` wrote: a checkpoint folder, or its `ema`.

        Raises UserError if a file is missing or damaged, or a tensor does not fit its network.
        """
        folder = Path(folder)
        values = read_json(file := folder / CONFIG, "give a checkpoint folder of Step1_GFDM.train")
        check_sizes(values, file)
        if "frame_step" not in values:
            note = (
                f"no frame_step, taken as {GFDMConfig.frame_step}; if its clips had another, write it there"
            )
            print_once(f"{file}: {note}")
        config = typed(GFDMConfig, values, str(file))
        named = config.clip.pretrained is not None
        clip = CLIPText.from_config(config.clip) if named else CLIPText.load(folder / "text", config.clip)
        return cls(config, **pipeline.load(folder), clip=clip)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model, frozen parts included: a diffusers folder that stands on its own.

        Besides Stable Video Diffusion's parts (`Step1_GFDM.pipeline`) it holds gfdm.json, the configuration,
        which the next stage reads, and text/, the CLIP text tower, unless the configuration names its source.
        """
        pipeline.save(folder, unet=self.unet, vae=self.vae, scheduler=self.scheduler)
        if self.config.clip.pretrained is None:
            self.clip.save(folder / "text")
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=1))

    def load_weights(self, folder: Path) -> None:
        pipeline.load_network(self.unet, Path(folder) / "unet")

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

    def encode_text(self, texts: list[str]) -> Text:
        """CLIP token states concatenated with themselves."""
        states = self.clip.tokens(texts)
        return torch.cat([states, states], dim=-1)

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "N 3 H W"]) -> Picture:
        """Scaled latents (mode of the posterior) of images in [-1, 1]; float32, as the VAE may not be."""
        return self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float() * self.scaling

    @torch.no_grad()
    def decode_latents(self, latents: Video) -> Float[Tensor, "N F 3 H W"]:
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

    def beside_image(self, noisy: Video, image: Picture) -> Float[Tensor, "N F 8 h w"]:
        """What the UNet sees: noisy latents, and on further channels the scaled image condition, unscaled."""
        return torch.cat([noisy, (image / self.scaling).unsqueeze(1).expand_as(noisy)], dim=2)

    def velocity(
        self, noisy: Video, time: Tensor, *, image: Picture, text: Text, time_ids: Float[Tensor, "N 3"]
    ) -> Video:
        """The UNet's prediction. noisy: of unit deviation. time: ln(sigma)/4. image: scaled."""
        given = self.beside_image(noisy, image)
        return self.unet(given, time, encoder_hidden_states=text, added_time_ids=time_ids).sample

    def denoising_loss(
        self,
        latents: Video,
        text: Text,
        *,
        condition: Picture,
        noise_aug: float | Float[Tensor, " N"] = 0.0,
        noise: Video,
        normal: Float[Tensor, "N 1 1 1 1"],
    ) -> Float[Tensor, ""]:
        """EDM loss with sigma_data 1 (Karras et al. 2022, table 1), v-prediction preconditioning as in SVD.

        latents and condition are scaled; normal is the standard normal draw behind each sample's sigma.
        """
        edm = self.config.diffusion
        sigma = torch.exp(edm.sigma_mean + edm.sigma_std * normal)
        noisy = latents + sigma * noise
        scaled, time = noisy / (sigma**2 + 1).sqrt(), sigma.log().flatten() / 4
        time_ids = self.time_ids(len(latents), edm.fps, edm.motion_bucket, noise_aug)
        velocity = self.velocity(scaled, time, image=condition, text=text, time_ids=time_ids)
        denoised = -sigma / (sigma**2 + 1).sqrt() * velocity.float() + noisy / (sigma**2 + 1)
        return ((sigma**2 + 1) / sigma**2 * (denoised - latents) ** 2).mean()

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """Loss of a batch with `text`, `seed` and either `latents` [B, F, 4, h, w] (scaled) or `frames`
        [B, F, 3, H, W] in [-1, 1], whose first one then gets noise of strength exp(N(-3, 0.5))."""
        random = SampleNoise(batch["seed"], self.unet.device)
        keep = random.uniform("text dropout", 1, 1) >= self.config.diffusion.text_dropout
        normal = random.normal("video sigma", 1, 1, 1, 1)
        noise_aug = torch.zeros(len(keep), device=keep.device)
        if "latents" in batch:
            latents = batch["latents"]
            condition = latents[:, 0]
        else:
            frames = batch["frames"]
            latents = self.encode_images(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
            noise_aug = torch.exp(0.5 * random.normal("strength of the condition's noise") - 3)
            blur = noise_aug[:, None, None, None] * random.normal("condition", *frames.shape[2:])
            condition = self.encode_images(frames[:, 0] + blur)
        text, noise = self.encode_text(batch["text"]) * keep, random.normal("video", *latents.shape[1:])
        given = {"condition": condition, "noise_aug": noise_aug, "noise": noise, "normal": normal}
        return {"loss": self.denoising_loss(latents, text, **given)}

    @torch.no_grad()
    def generate(self, latents: Picture, text: Text, *, noise: Video, steps: int | None = None) -> Video:
        """Scaled latents of the imagined clips, by Euler steps with classifier-free guidance.

        latents: the scaled image condition. text: `encode_text`. Guidance rises linearly over the frames;
        the unconditional branch has zero text and a zero image latent.
        """
        sampling, edm = self.config.sampling, self.config.diffusion
        image, text = (torch.cat([torch.zeros_like(given), given]) for given in (latents, text))
        time_ids = self.time_ids(len(text), edm.fps, edm.motion_bucket, sampling.noise_aug)
        guidance = torch.linspace(sampling.min_guidance, sampling.max_guidance, noise.shape[1])
        guidance = guidance.to(noise.device)[:, None, None, None]
        self.scheduler.set_timesteps(steps or sampling.steps)
        sample = noise * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            noisy = self.scheduler.scale_model_input(torch.cat([sample, sample]), timestep)
            velocity = self.velocity(noisy, timestep, image=image, text=text, time_ids=time_ids)
            without, conditioned = velocity.chunk(2)
            guided = without + guidance * (conditioned - without)
            sample = self.scheduler.step(guided, timestep, sample).prev_sample
        return sample

    @torch.inference_mode()
    def imagine(
        self, first: Picture, texts: list[str], *, seed: int, steps: int | None = None
    ) -> Float[Tensor, "N F 3 H W"]:
        """Imagined frames in [-1, 1], on the CPU, from scaled latents of the first ones; a clip's noise
        depends on `seed` and on its place among the clips."""
        device, seeds = self.unet.device, sample_seeds("imagined", seed, len(first))
        noise = SampleNoise(seeds, device).normal("video", *self.config.clip_shape)
        latents = self.generate(first.to(device), self.encode_text(texts), noise=noise, steps=steps)
        return self.decode_latents(latents).cpu()

    def features(self, latents: Picture, texts: list[str], *, noise: Video) -> Float[Tensor, "N F L C"]:
        """Features of the imagined future of each image: one partial UNet pass at the first sampling step.

        latents: scaled. noise: standard normal. Gradients reach the UNet's weights that require them; where
        none does, no graph is built.
        """
        maps = self.feature_maps(latents, self.encode_text(texts), noise=noise)
        return maps.flatten(3).transpose(2, 3)

    def feature_maps(
        self, latents: Picture, text: Text, *, noise: Video, step: int = 1
    ) -> Float[Tensor, "N F C h2 w2"]:
        """`features` as maps, at the `step`-th sampling step; those before it run in full, unguided."""
        dtype = self.unet.dtype
        sample, time_ids = self._start(noise)
        *earlier, timestep = self.scheduler.timesteps[:step]
        for before in earlier:
            noisy = self.scheduler.scale_model_input(sample, before)
            velocity = self.velocity(noisy, before, image=latents, text=text, time_ids=time_ids)
            sample = self.scheduler.step(velocity, before, sample).prev_sample
        given = self.beside_image(self.scheduler.scale_model_input(sample, timestep), latents).to(dtype)
        time = timestep.expand(len(latents))
        return up_block_features(self.unet, given, time, text.to(dtype), time_ids)

    @torch.no_grad()
    def predict_once(self, latents: Picture, texts: list[str], *, noise: Video) -> Video:
        """Scaled clean latents as predicted by the pass of `features`, run to its end."""
        sample, time_ids = self._start(noise)
        timestep, text = self.scheduler.timesteps[0], self.encode_text(texts)
        noisy = self.scheduler.scale_model_input(sample, timestep)
        velocity = self.velocity(noisy, timestep, image=latents, text=text, time_ids=time_ids)
        return self.scheduler.step(velocity, timestep, sample).pred_original_sample

    def _start(self, noise: Video) -> tuple[Video, Float[Tensor, "N 3"]]:
        """Of the schedule that features are read from: the first sample, and the time ids."""
        wanted = self.config.features
        self.scheduler.set_timesteps(wanted.steps)
        time_ids = self.time_ids(len(noise), wanted.fps, wanted.motion_bucket, 0.0)
        return noise * self.scheduler.init_noise_sigma, time_ids
