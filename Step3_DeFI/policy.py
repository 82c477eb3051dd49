"""DeFI: the joint policy. Imagine the future (GFDM), name its motion (GIDM), act (diffusion of actions).

DeFI (arXiv 2604.16391), stage 3. Training and rollout share one path from pictures to context.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from defi.engine.checkpoint import find_weights
from defi.engine.data import SampleNoise
from defi.engine.model import CONFIG, StageModel
from defi.engine.weights import COPY_AGAIN
from defi.errors import reading
from defi.hub import local_folder
from defi.robot.chunk import UnderWay
from defi.text import T5Text
from Step1_GFDM.model import GFDM
from Step2_GIDM.blocks import SpatioTemporalBlock
from Step2_GIDM.latent_action import LatentActionSizes
from Step2_GIDM.quantizer import Quantized, perplexity
from Step3_DeFI.action_head import ActionDenoiser, EncoderLayer, Memory
from Step3_DeFI.config import PolicyConfig, StageSizes, check
from Step3_DeFI.diffusion import SAMPLERS, Ahead, Denoiser, denoising_loss, guide, hold, precondition
from Step3_DeFI.features import Standardise, encode_views, idle, imagine, merge_tokens, set_up, video_noise
from Step3_DeFI.gidm_branch import GIDMBranch
from Step3_DeFI.stages import Sources, load_stages, read_parts, write_sources
from Step3_DeFI.video_former import VideoFormer, VideoFormerLayer


@dataclass
class PolicyNoise:
    """All randomness of one chunk: standard normal numbers per sample."""

    video: Float[Tensor, "B V F 4 h w"]
    actions: Float[Tensor, "B K A"]


@dataclass
class Context:
    """What the action head encodes: all that depends neither on σ nor on the noisy actions; and the codes."""

    sentence: Float[Tensor, "B P"]
    video_tokens: Float[Tensor, "B FQ D"]
    latent_actions: Float[Tensor, "B Q Dg"]
    codes: Quantized | None  # None: no branch
    state: Float[Tensor, "B S"] | None = None  # normalised

    def both(self) -> "Context":
        """2B rows for guidance: B as they are, then the same without sentence."""
        return replace(
            self,
            sentence=torch.cat([self.sentence, torch.zeros_like(self.sentence)]),
            video_tokens=self.video_tokens.repeat(2, 1, 1),
            latent_actions=self.latent_actions.repeat(2, 1, 1),
            state=None if self.state is None else self.state.repeat(2, 1),
        )


class DeFI(StageModel):
    """VideoFormer, GIDM branch and action head, trained together on top of GFDM.

    GFDM is frozen as in the paper, or finetuned as `config.finetune` says: then what changes of its UNet is
    trained, averaged and saved with the rest, and the stage-1 checkpoint is loaded below it.
    """

    stage = "policy"
    config_class = PolicyConfig
    # Not the action decoder's layers: `encode` computes their keys and values ahead.
    blocks = (*GFDM.blocks, SpatioTemporalBlock, VideoFormerLayer, EncoderLayer)
    config: PolicyConfig

    def __init__(
        self,
        config: PolicyConfig,
        *,
        gfdm: GFDM,
        t5: T5Text,
        latent_action: LatentActionSizes,
        sources: Sources | None = None,
    ) -> None:
        """t5, latent_action: of stage 2, which must know language, the text tower and the tokenizer's sizes.
        sources: where the checkpoints of both stages lie; None: nowhere, or beside the policy.
        """
        super().__init__()
        check("policy.robot", config.robot, config.robot is not None, "give the robot of the data")
        rule = "a policy needs a stage-2 checkpoint of variant language"
        check("gidm.variant", "controllable", latent_action.text_width is not None, rule)
        stages = StageSizes(
            frames=gfdm.config.frames,
            feature_tokens=gfdm.feature_tokens,
            feature_channels=gfdm.feature_channels,
            sentence_width=gfdm.clip.projection,
            latent_action=latent_action,
        )
        self.config, self.sources = replace(config, stages=stages), sources
        self.gfdm, self.t5 = gfdm, t5
        set_up(gfdm, config)
        self.frozen = (*idle(gfdm, "gfdm"), "t5")
        channels = stages.feature_channels * config.merge**2
        self.video_former = VideoFormer(
            feature_channels=channels, frames=stages.frames, **vars(config.video_former)
        )
        shape = (config.views, stages.feature_tokens, stages.feature_channels)
        self.standardise = Standardise(*shape) if config.standardise else nn.Identity()
        self.gidm_branch = None
        if config.latent_actions:
            self.gidm_branch = GIDMBranch(
                stages.latent_action, feature_channels=channels, frames=config.latent_action_frames
            )
            self.gidm_branch.tokenizer.encoder.mixed_text_masks = config.mixed_text_masks
        self.action_head = ActionDenoiser(
            config.action_head,
            sentence_dim=stages.sentence_width,
            video_dim=config.video_former.dim,
            latent_action_dim=stages.latent_action.width,
            action_dim=config.action_dim,
            chunk=config.chunk,
            state_dim=config.state_dim,
        )
        self.freeze()

    # ------------------------------------------------------------ from pictures to context

    def context(
        self,
        features: Float[Tensor, "B V F L C"],
        texts: list[str],
        state: Float[Tensor, "B S"] | None = None,
    ) -> Context:
        """From what is seen and said to what the action head encodes; computed once per chunk.

        state: in the robot's units; looked at only with `policy.state`.
        """
        if self.config.video_precision != "no":
            features = features.to(self.dtype)
        features = merge_tokens(self.standardise(features), self.config.merge)
        tokens, codes = self._latent_actions(features[:, 0], texts)
        return Context(
            sentence=self.gfdm.clip.sentence(texts),
            video_tokens=self.video_former(features.transpose(1, 2).flatten(2, 3)),
            latent_actions=tokens,
            codes=codes,
            state=self._normal_state(state),
        )

    def _latent_actions(
        self, features: Float[Tensor, "B F L C"], texts: list[str]
    ) -> tuple[Float[Tensor, "B Q Dg"], Quantized | None]:
        """Tokens and codes of the static view's motion; without a branch Q is 0."""
        if self.gidm_branch is None:
            return features.new_zeros(len(texts), 0, self.config.stages.latent_action.width), None
        language = self.t5(
            texts,
            full_length=not self.training,
            together=self.training and self.config.mixed_text_masks,
            dropout=self.training and self.config.t5_dropout,
        )
        found = self.gidm_branch(features, *language)
        return found.tokens, found.codes

    def encode(self, context: Context) -> Memory:
        """What the action decoder looks at."""
        return self.action_head.encode(
            sentence=context.sentence,
            video_tokens=context.video_tokens,
            latent_actions=context.latent_actions,
            state=context.state,
        )

    def _normal_state(self, state: Float[Tensor, "B S"] | None) -> Float[Tensor, "B S"] | None:
        if not self.config.state:
            return None
        return self.config.robot.state.normalise(state.to(self.device, torch.float32)).to(self.dtype)

    # ------------------------------------------------------------ training

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            batch: `text` (B strings), `actions` [B, K, A] and, with `policy.state`, `state` [B, S] in the
                robot's units, `seed` [B], and one of `features` [B, V, F, L, C], `latents` [B, V, 4, h, w]
                (scaled), `images` [B, V, 3, H, W] (uint8 or in [-1, 1]); for a video loss also `video`, the
                frames that really follow: latents or images [B, V, F, ...].
        """
        context = self.context(self._features_of(batch), batch["text"], batch.get("state"))
        actions = self.config.robot.actions.normalise(batch["actions"].float())
        action_loss = self._action_loss(context, actions, batch["seed"])
        codes, weights, loss, parts = context.codes, self.config, action_loss, {"action_loss": action_loss}
        if codes is not None:
            loss = (
                action_loss
                + weights.codebook_weight * codes.codebook_loss
                + weights.commitment_weight * codes.commitment_loss
            )
            parts |= {"codebook": codes.codebook_loss, "commitment": codes.commitment_loss}
            parts["perplexity"] = perplexity(codes.counts)
        if weights.finetune.video_loss:
            parts["video_loss"] = self._video_loss(batch)
            loss = loss + weights.finetune.video_loss * parts["video_loss"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _features_of(
        self, batch: dict[str, Any], noise: Float[Tensor, "B V F 4 h w"] | None = None
    ) -> Float[Tensor, "B V F L C"]:
        """Features, stored or imagined now; with a gradient where the video model learns."""
        if "features" in batch:
            return batch["features"].to(self.device, self.dtype)
        if noise is None:
            noise = video_noise(self.gfdm, self.config, batch["seed"], self.device)
        own = self.config.video_precision != "no"  # computes in that, not in autocast's
        with torch.autocast(self.device.type, enabled=False) if own else nullcontext():
            if "latents" in batch:
                latents = batch["latents"].to(self.device, self.dtype)
            else:
                latents = encode_views(self.gfdm, batch["images"].to(self.device))
            return imagine(self.gfdm, latents, batch["text"], noise=noise)

    def _action_loss(
        self, context: Context, actions: Float[Tensor, "B K A"], seeds: Int[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """Denoising loss over `draws` pairs of σ and noise per sample, which share one encoded context."""
        diffusion = self.config.diffusion
        draw = SampleNoise(seeds, self.device)
        sigma = diffusion.sigma(draw.uniform("action sigma", diffusion.draws))
        noise = draw.normal("actions", diffusion.draws, *actions.shape[1:])
        dropped = draw.uniform("sentence dropout", 1) < diffusion.text_dropout
        memory = self.encode(replace(context, sentence=context.sentence * ~dropped))
        return denoising_loss(
            lambda noisy, level: self.action_head.decode(memory, noisy, self.action_head.noise_levels(level)),
            actions[:, None],
            noise=noise,
            sigma=sigma,
            sigma_data=diffusion.sigma_data,
        )

    def _video_loss(self, batch: dict[str, Any]) -> Float[Tensor, ""]:
        """Stage 1's loss on the real next frames of the same samples; each view is a clip of its own."""
        video, views = batch["video"].to(self.device), self.config.views
        clips = video.flatten(0, 1)
        draw = SampleNoise(batch["seed"], self.device)
        seeds = torch.stack([draw.others(f"video of view {view}") for view in range(views)], dim=1)
        clip_batch = {
            "latents": encode_views(self.gfdm, clips) if "images" in batch else clips.to(self.dtype),
            "text": [text for text in batch["text"] for _ in range(views)],
            "seed": seeds.flatten(),
        }
        return self.gfdm(clip_batch)["loss"]

    @torch.no_grad()
    def fit_standardisation(self, batch: dict[str, Any]) -> None:
        """Take the mean and deviation of features from a batch that represents the training data."""
        if self.config.standardise:
            self.standardise.fit(self._features_of(batch))

    def epoch_end(self) -> dict[str, float]:
        """Restart codes that no sample of the epoch used, where that is wanted."""
        if not self.config.restart_codes or self.gidm_branch is None:
            return {}
        return {"restarted_codes": float(self.gidm_branch.tokenizer.quantizer.restart_unused())}

    # ------------------------------------------------------------ acting

    def noise(self, seeds: Int[Tensor, " B"]) -> PolicyNoise:
        """The noise of B observations, one seed each: the same whatever else is in the batch."""
        actions = SampleNoise(seeds, self.device).normal("actions", self.config.chunk, self.config.action_dim)
        return PolicyNoise(video=video_noise(self.gfdm, self.config, seeds, self.device), actions=actions)

    @torch.no_grad()
    def act(
        self,
        images: UInt8[Tensor, "B V 3 H W"] | Float[Tensor, "B V 3 H W"],
        texts: list[str],
        *,
        noise: PolicyNoise,
        state: Float[Tensor, "B S"] | None = None,
        under_way: Sequence[UnderWay | None] = (),
    ) -> Float[Tensor, "B K A"]:
        """The next K actions in the robot's units, gripper not snapped. `images` as `observe` gives them.

        under_way: what the actions go on from, per row; see `defi.robot.chunk`.
        """
        features = self._features_of({"images": images, "text": texts}, noise.video)
        return self.act_on_features(features, texts, noise=noise.actions, state=state, under_way=under_way)

    @torch.no_grad()
    def act_on_features(
        self,
        features: Float[Tensor, "B V F L C"],
        texts: list[str],
        *,
        noise: Float[Tensor, "B K A"],
        state: Float[Tensor, "B S"] | None = None,
        under_way: Sequence[UnderWay | None] = (),
    ) -> Float[Tensor, "B K A"]:
        """As `act`, from features."""
        diffusion = self.config.diffusion
        sigmas = diffusion.schedule(self.device)
        denoise = self.denoiser(self.context(features.to(self.dtype), texts, state), sigmas)
        if any(each is not None for each in under_way):
            normalise, shape = self.config.robot.actions.normalise, noise.shape[1:]
            ahead = Ahead.of(under_way, normalise, shape=shape, fade=diffusion.fade)
            denoise = hold(denoise, ahead.to(self.device))
        actions = SAMPLERS[diffusion.sampler](denoise, noise * sigmas[0], sigmas).float()
        return self.config.robot.actions.restore(actions)

    def denoiser(self, context: Context, sigmas: Float[Tensor, " S1"]) -> Denoiser:
        """D(x, σᵢ) of B chunks; each context is encoded once, or with and without its sentence if guided."""
        diffusion = self.config.diffusion
        guided = diffusion.guidance != 1
        memory = self.encode(context.both() if guided else context)
        levels = self.action_head.noise_levels(sigmas[:-1])  # the last one is 0, where nothing is left to do
        denoise = precondition(
            lambda noisy, i: self.action_head.decode(memory, noisy, [level[i] for level in levels]),
            sigmas,
            sigma_data=diffusion.sigma_data,
        )
        return guide(denoise, diffusion.guidance) if guided else denoise

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> Float[Tensor, "B K A"]:
        """The chunks it would act out on a training batch (whose `actions` are not looked at)."""
        noise = self.noise(batch["seed"])
        features, given = self._features_of(batch, noise.video), {"state": batch.get("state")}
        return self.act_on_features(features, batch["text"], noise=noise.actions, **given)

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
            UserError: a checkpoint is missing, of another stage, or knows no language.
        """
        sources = {"gfdm": find_weights(gfdm, "gfdm"), "gidm": find_weights(gidm, "gidm")}
        parts, tokenizer = load_stages(sources)
        policy = cls(config, **parts)
        if policy.gidm_branch is not None:
            policy.gidm_branch.tokenizer.load_state_dict(tokenizer.state_dict())
        return policy

    def save_pretrained(self, folder: Path) -> None:
        """Trained weights, config, and where stage 1 and 2 lie (relative paths and fingerprints)."""
        super().save_pretrained(folder)
        if self.sources is not None:
            write_sources(folder, self.sources)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, gfdm: Path | str | None = None, gidm: Path | str | None = None
    ) -> "DeFI":
        """The policy in a checkpoint folder, an exported folder, or one of these on the hub, `user/name`.

        gfdm, gidm: where the checkpoints that it stands on lie, if moved.

        Raises:
            UserError: a file is missing or damaged, or a stage's checkpoint is not the one it was trained on.
        """
        file = local_folder(folder) / CONFIG
        config = PolicyConfig.read(file)
        parts = read_parts(file.parent, config, gfdm=gfdm, gidm=gidm)
        with reading(file, COPY_AGAIN):
            policy = cls(config, **parts)
        policy.load_weights(file.parent)
        return policy
