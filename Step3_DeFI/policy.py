"""DeFI: the joint policy. Imagine the future (GFDM), name its motion (GIDM), act (diffusion of actions).

DeFI (arXiv 2604.16391), stage 3. Training and rollout share one path from pictures to context.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from defi.config import typed
from defi.engine.checkpoint import find_weights
from defi.engine.data import SampleNoise
from defi.engine.model import CONFIG, StageModel
from defi.errors import UserError
from defi.text import T5Text
from Step1_GFDM.model import GFDM
from Step2_GIDM.model import GIDM
from Step2_GIDM.quantizer import perplexity
from Step3_DeFI.action_head import ActionDenoiser, Memory
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.diffusion import SAMPLERS, denoising_loss, precondition
from Step3_DeFI.features import Standardise, encode_views, imagine, merge_tokens, video_noise
from Step3_DeFI.gidm_branch import GIDMBranch
from Step3_DeFI.sources import Sources, check_gfdm, check_gidm
from Step3_DeFI.video_former import VideoFormer


@dataclass
class PolicyNoise:
    """All randomness of one look: standard normal numbers per sample."""

    video: Float[Tensor, "B V F 4 h w"]
    actions: Float[Tensor, "B K A"]


@dataclass
class Context:
    """What the action decoder looks at, and the latent actions in it."""

    memory: Memory
    codes: Int[Tensor, "B Q"]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]


class DeFI(StageModel):
    """VideoFormer, GIDM branch and action head, trained together on top of a frozen GFDM."""

    stage: ClassVar[str] = "policy"
    config_class: ClassVar[type] = PolicyConfig
    frozen: ClassVar[tuple[str, ...]] = ("gfdm", "t5")
    config: PolicyConfig

    def __init__(
        self, config: PolicyConfig, *, gfdm: GFDM, t5: T5Text, sources: Sources | None = None
    ) -> None:
        super().__init__()
        check_gfdm(config, gfdm)
        self.config, self.sources = config, sources
        self.gfdm, self.t5 = gfdm, t5
        former = config.video_former
        self.video_former = VideoFormer(
            feature_channels=config.feature_channels * config.merge**2,
            dim=former.dim,
            depth=former.depth,
            heads=former.heads,
            head_dim=former.head_dim,
            frames=config.frames,
            queries=former.queries,
        )
        look = (config.views, config.feature_tokens, config.feature_channels)
        self.standardise = Standardise(look) if config.standardise else nn.Identity()
        self.gidm_branch = GIDMBranch(
            config.latent_action,
            feature_channels=config.feature_channels * config.merge**2,
            frames=config.latent_action_frames,
        )
        self.action_head = ActionDenoiser(
            config.action_head,
            sentence_dim=config.sentence_width,
            video_dim=former.dim,
            latent_action_dim=config.latent_action.width,
            action_dim=config.action_dim,
            chunk=config.chunk,
        )
        self.freeze()

    # ------------------------------------------------------------ from pictures to context

    def video_noise(self, seeds: Int[Tensor, " B"]) -> Float[Tensor, "B V F 4 h w"]:
        """Noise for GFDM, a function of each sample's seed (or of nothing, if `feature_noise: fixed`)."""
        views, kind = self.config.views, self.config.feature_noise
        return video_noise(self.gfdm, seeds, views=views, kind=kind, device=self.device)

    def context(self, features: Float[Tensor, "B V F L C"], texts: list[str]) -> Context:
        """Everything that does not depend on σ or on the noisy actions; computed once per chunk."""
        features = merge_tokens(self.standardise(features), self.config.merge)
        video_tokens = self.video_former(features.transpose(1, 2).flatten(2, 3))
        latent_actions = self.gidm_branch(features[:, 0], *self.t5(texts, full_length=not self.training))
        memory = self.action_head.encode(
            sentence=self.gfdm.clip.sentence(texts),
            video_tokens=video_tokens,
            latent_actions=latent_actions.tokens,
        )
        codes = latent_actions.codes
        return Context(memory, codes.indices, codes.codebook_loss, codes.commitment_loss)

    # ------------------------------------------------------------ training

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            batch: `text` (B strings), `actions` [B, K, 7], `seed` [B], and one of `features` [B, V, F, L, C],
                `latents` [B, V, 4, h, w] (scaled), `images` [B, V, 3, H, W] (uint8 or in [-1, 1]).
        """
        context = self.context(self._features_of(batch), batch["text"])
        action_loss = self._action_loss(context.memory, batch["actions"].float(), batch["seed"])
        weights = self.config
        loss = (
            action_loss
            + weights.codebook_weight * context.codebook_loss
            + weights.commitment_weight * context.commitment_loss
        )
        counts = torch.bincount(context.codes.flatten(), minlength=self.config.latent_action.codes)
        return {
            "loss": loss,
            "action_loss": action_loss.detach(),
            "codebook": context.codebook_loss.detach(),
            "commitment": context.commitment_loss.detach(),
            "perplexity": perplexity(counts),
        }

    def _features_of(self, batch: dict[str, Any]) -> Float[Tensor, "B V F L C"]:
        if "features" in batch:
            return batch["features"].to(self.device, self.dtype)
        if "latents" in batch:
            latents = batch["latents"].to(self.device, self.dtype)
        else:
            latents = encode_views(self.gfdm, batch["images"].to(self.device))
        return imagine(self.gfdm, latents, batch["text"], noise=self.video_noise(batch["seed"]))

    def _action_loss(
        self, memory: Memory, actions: Float[Tensor, "B K A"], seeds: Int[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """Denoising loss over `draws` pairs of σ and noise per sample."""
        diffusion = self.config.diffusion
        draw = SampleNoise(seeds, self.device)
        sigma = diffusion.sigma(draw.uniform(diffusion.draws))
        noise = draw.normal(diffusion.draws, *actions.shape[1:])
        return denoising_loss(
            lambda noisy, level: self.action_head.decode(memory, noisy, level),
            actions[:, None],
            noise=noise,
            sigma=sigma,
            sigma_data=diffusion.sigma_data,
        )

    def fit_standardisation(self, batch: dict[str, Any]) -> None:
        """Take the mean and deviation of features from a batch that represents the training data."""
        if self.config.standardise:
            self.standardise.fit(self._features_of(batch))

    def epoch_end(self) -> dict[str, float]:
        """Restart codes that no sample of the epoch used."""
        return {"restarted_codes": float(self.gidm_branch.tokenizer.quantizer.restart_unused())}

    # ------------------------------------------------------------ acting

    def noise(self, seeds: Int[Tensor, " B"]) -> PolicyNoise:
        """The noise of B looks, one seed each: the same whatever else is in the batch."""
        actions = SampleNoise(seeds, self.device).normal(self.config.chunk, self.config.action_dim)
        return PolicyNoise(video=self.video_noise(seeds), actions=actions)

    @torch.no_grad()
    def act(
        self,
        images: UInt8[Tensor, "B V 3 H W"] | Float[Tensor, "B V 3 H W"],
        texts: list[str],
        *,
        noise: PolicyNoise,
    ) -> Float[Tensor, "B K A"]:
        """The next K actions, gripper not binarised. `images` as `observe` gives them: static, gripper."""
        latents = encode_views(self.gfdm, images.to(self.device))
        features = imagine(self.gfdm, latents, texts, noise=noise.video)
        return self.act_on_features(features, texts, noise=noise.actions)

    @torch.no_grad()
    def act_on_features(
        self, features: Float[Tensor, "B V F L C"], texts: list[str], *, noise: Float[Tensor, "B K A"]
    ) -> Float[Tensor, "B K A"]:
        """As `act`, from features."""
        diffusion = self.config.diffusion
        memory = self.context(features.to(self.dtype), texts).memory
        denoise = precondition(
            lambda noisy, sigma: self.action_head.decode(memory, noisy, sigma),
            sigma_data=diffusion.sigma_data,
        )
        sigmas = diffusion.schedule(self.device)
        return SAMPLERS[diffusion.sampler](denoise, noise * sigmas[0], sigmas).float()

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> Float[Tensor, "B K A"]:
        """The chunks it would act out on a training batch (whose `actions` are not looked at)."""
        seeds = batch["seed"]
        actions = SampleNoise(seeds, self.device).normal(self.config.chunk, self.config.action_dim)
        return self.act_on_features(self._features_of(batch), batch["text"], noise=actions)

    @property
    def image_size(self) -> int:
        """H = W of the pictures it wants."""
        return self.gfdm.config.image_size

    @property
    def device(self) -> torch.device:
        return self.action_head.predict.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.action_head.predict.weight.dtype

    # ------------------------------------------------------------ checkpoints

    @classmethod
    def from_stages(cls, config: PolicyConfig, *, gfdm: Path | str, gidm: Path | str) -> "DeFI":
        """A new policy on a stage-1 and a stage-2 checkpoint (run or checkpoint folders).

        Raises:
            UserError: a checkpoint is missing, of another stage, or of other sizes than `config` says.
        """
        sources = Sources.at(gfdm=find_weights(gfdm, "gfdm"), gidm=find_weights(gidm, "gidm"))
        stage2 = GIDM.from_pretrained(sources.gidm)
        check_gidm(config, stage2, sources.gidm)
        policy = cls(config, gfdm=sources.load_gfdm(config), t5=stage2.text, sources=sources)
        policy.gidm_branch.tokenizer.load_state_dict(stage2.tokenizer.state_dict())
        return policy

    def save_pretrained(self, folder: Path) -> None:
        """Trained weights, config, and where stage 1 and 2 lie (relative paths and fingerprints)."""
        super().save_pretrained(folder)
        (folder / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=1))
        if self.sources is not None:
            self.sources.write(folder)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, gfdm: Path | str | None = None, gidm: Path | str | None = None
    ) -> "DeFI":
        """The policy that `save_pretrained` wrote. gfdm, gidm: where its checkpoints lie, if moved.

        Raises:
            UserError: a file is missing or damaged, or a stage's checkpoint is not the one it was trained on.
        """
        folder = Path(folder)
        config = typed(PolicyConfig, _read_json(folder / CONFIG), str(folder / CONFIG))
        sources = Sources.read(folder, gfdm=gfdm, gidm=gidm)
        policy = cls(config, gfdm=sources.load_gfdm(config), t5=sources.load_t5(), sources=sources)
        policy.load_weights(folder)
        return policy


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the checkpoint again") from None
