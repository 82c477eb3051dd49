"""Sizes and constants of stage 3; the defaults are those of the published model."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defi.config import typed
from defi.errors import UserError
from Step2_GIDM.latent_action import LatentActionSizes
from Step3_DeFI.diffusion import SAMPLERS, exponential_schedule, log_logistic

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class VideoFormerConfig:
    """queries: tokens per frame."""

    dim: int = 384
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    queries: int = 14


@dataclass
class ActionHeadConfig:
    """Sizes of the action head.

    cross_attention: `full`, with a learned position per action, or `causal` as in the published weights:
        action i sees the first i + 1 tokens, which is then the only sign of which action it is.
    identity_modulation: begin with plain layers, AdaLN's scale and gate 1 (published: 0, nearly closed).
    """

    dim: int = 384
    encoder_layers: int = 4
    decoder_layers: int = 4
    heads: int = 8
    attention_dropout: float = 0.3
    residual_dropout: float = 0.1
    mlp_dropout: float = 0.05
    cross_attention: str = "full"
    identity_modulation: bool = False

    def __post_init__(self) -> None:
        if self.cross_attention not in ("full", "causal"):
            raise UserError(
                f"policy.action_head.cross_attention={self.cross_attention}: must be full or causal"
            )


@dataclass
class ActionDiffusionConfig:
    """Training σ: log-logistic around sigma_data. Sampling: `steps` levels, sigma_max … last_sigma, then 0.

    draws: (σ, noise) pairs per sample and training step, which share one encoded context (published: 1).
    sampler: ddim (published), dpmpp_2m or heun; heun calls the network twice per step.
    text_dropout: share of the training samples whose sentence embedding the head sees as zero (published: 0).
    guidance: scale of classifier-free guidance on the sentence embedding; 1: off, at no cost.
    """

    sigma_data: float = 0.5
    density_scale: float = 0.5
    sigma_min: float = 0.001
    sigma_max: float = 80.0
    draws: int = 1
    sampler: str = "ddim"
    steps: int = 10
    last_sigma: float = 1.0
    text_dropout: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"policy.diffusion.sampler={self.sampler}: choose one of {', '.join(SAMPLERS)}")
        if self.steps < 1:
            raise UserError(f"policy.diffusion.steps={self.steps}: must be 1 or more")
        if not 0 <= self.text_dropout < 1:
            raise UserError(f"policy.diffusion.text_dropout={self.text_dropout}: must lie in [0, 1)")
        if self.guidance != 1 and self.text_dropout == 0:
            raise UserError(
                f"policy.diffusion.guidance={self.guidance}: the policy never saw a dropped text; "
                "train it with policy.diffusion.text_dropout=0.1, or leave guidance at 1"
            )

    def sigma(self, u: Tensor) -> Tensor:
        """Noise levels of training from uniform u in [0, 1]."""
        return log_logistic(
            u,
            loc=math.log(self.sigma_data),
            scale=self.density_scale,
            minimum=self.sigma_min,
            maximum=self.sigma_max,
        )

    def schedule(self, device: torch.device | str = "cpu") -> Tensor:
        """Noise levels of sampling, descending, 0 at the end."""
        return exponential_schedule(
            self.steps, sigma_max=self.sigma_max, sigma_min=self.last_sigma, device=device
        )


@dataclass
class FinetuneConfig:
    """What of the video model learns with the policy, through the features (published: nothing).

    mode: `none`; `lora`: adapters of `rank` on its attention; `full`: all weights on the way to the features.
    video_loss: weight of stage 1's own loss on the same samples, which keeps it a video model; 0: off.
    Settings: gfdm.finetune, gfdm.lora_rank, gfdm.video_loss.
    """

    mode: str = "none"
    rank: int = 16
    video_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("none", "lora", "full"):
            raise UserError(f"gfdm.finetune={self.mode}: must be none, lora or full")
        if self.rank < 1:
            raise UserError(f"gfdm.lora_rank={self.rank}: must be 1 or more")
        if self.video_loss < 0 or (self.video_loss and self.mode == "none"):
            raise UserError(
                f"gfdm.video_loss={self.video_loss}: must be 0, or positive with gfdm.finetune=lora or full"
            )


@dataclass
class PolicyConfig:
    """What the policy expects of the checkpoints it is built on, and its own sizes.

    views: V, cameras: static and gripper. chunk: K, actions predicted at once. action_dim: A; an action is
    [dx, dy, dz] / 0.02 m, [droll, dpitch, dyaw] / 0.05 rad, gripper +1 open, −1 closed.
    frames, feature_tokens, feature_channels, sentence_width: F, L, C of stage 1's features, P of its CLIP.
    latent_action, latent_action_frames: stage 2's tokenizer and the two imagined frames it looks at.
    feature_noise: `fresh` noise per look, or the same (`fixed`) noise for all, which makes features a
    function of image and text (published: fresh). standardise: see `features.Standardise` (published: off).
    merge: side of the squares of neighbouring feature tokens that are joined into one (published: 1).
    restart_codes: codes that no sample of an epoch used are restarted (published: no).
    t5_dropout: T5 runs with its dropout while the policy trains (published, by an oversight).
    mixed_text_masks: as in stage 2 (`LatentActionEncoder`; published, a fault).
    gfdm_precision: what UNet and VAE of a frozen video model are kept and computed in, whatever the rest is
        computed in: no (as the rest), fp16 (published) or bf16.
    codebook_weight, commitment_weight: of the loss. finetune: whether the video model learns as well.
    """

    views: int = 2
    frames: int = 16
    feature_tokens: int = 256
    feature_channels: int = 2560
    sentence_width: int = 512
    latent_action: LatentActionSizes = field(default_factory=LatentActionSizes)
    latent_action_frames: list[int] = field(default_factory=lambda: [0, 5])
    feature_noise: str = "fresh"
    standardise: bool = False
    merge: int = 1
    video_former: VideoFormerConfig = field(default_factory=VideoFormerConfig)
    action_head: ActionHeadConfig = field(default_factory=ActionHeadConfig)
    diffusion: ActionDiffusionConfig = field(default_factory=ActionDiffusionConfig)
    restart_codes: bool = False
    t5_dropout: bool = False
    mixed_text_masks: bool = False
    gfdm_precision: str = "no"
    chunk: int = 10
    action_dim: int = 7
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        if self.feature_noise not in ("fresh", "fixed"):
            raise UserError(f"policy.feature_noise={self.feature_noise}: must be fresh or fixed")
        if self.gfdm_precision not in PRECISIONS:
            raise UserError(
                f"policy.gfdm_precision={self.gfdm_precision}: choose one of {', '.join(PRECISIONS)}"
            )
        if max(self.latent_action_frames) >= self.frames:
            raise UserError(
                f"policy.latent_action_frames={self.latent_action_frames}: beyond policy.frames={self.frames}"
            )

    @property
    def video_precision(self) -> str:
        """`gfdm_precision`, but for a video model that learns, which needs float32."""
        return self.gfdm_precision if self.finetune.mode == "none" else "no"

    @classmethod
    def from_preset(cls, cfg: Mapping[str, Any]) -> "PolicyConfig":
        """From a composed configuration: its section `policy`."""
        return typed(cls, cfg["policy"], "policy")

    @classmethod
    def from_json(cls, values: dict[str, Any], file: Path) -> "PolicyConfig":
        """From the content of a checkpoint's `file`; in older ones positions were a setting of their own.

        Raises:
            UserError: a setting that there is not, or positions that do not go with the cross-attention.
        """
        head = values.get("action_head")
        if isinstance(head, dict) and "action_positions" in head:
            has, kind = head.pop("action_positions"), head.get("cross_attention", "full")
            if has != (kind == "full"):
                raise UserError(
                    f"{file}: cross_attention={kind} with action_positions={has} is no longer possible (full "
                    "cannot tell actions apart without positions, causal has none); train it again"
                )
        return typed(cls, values, str(file))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON; `from_json` reads them back."""
        return asdict(self)

    def fake_batch(self, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Valid training input from stored features."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, self.views, self.frames, self.feature_tokens, self.feature_channels)
        return {
            "features": torch.randn(shape, generator=generator),
            "text": [f"push block number {i} to the left" for i in range(batch_size)],
            "actions": torch.rand(batch_size, self.chunk, self.action_dim, generator=generator) * 2 - 1,
            "seed": torch.arange(batch_size),
        }
