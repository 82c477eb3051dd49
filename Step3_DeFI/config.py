"""The policy's choices; the defaults are those of the published model. Sizes come from stages 1 and 2."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import Tensor

from defi.config import typed
from defi.data.calvin import calvin_robot
from defi.engine.weights import COPY_AGAIN
from defi.errors import UserError
from defi.files import check_sizes, read_json
from defi.robot.spec import NORMALISATIONS, Robot
from Step2_GIDM.latent_action import LatentActionSizes
from Step3_DeFI.diffusion import SAMPLERS, exponential_schedule, log_logistic

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check(setting: str, value: object, fine: bool, rule: str) -> None:
    """Raises UserError, with the `rule`, if the value of a setting is not `fine`."""
    if not fine:
        raise UserError(f"{setting}={value}: {rule}")


def check_choice(setting: str, value: str, choices: Collection[str]) -> None:
    check(setting, value, value in choices, f"choose one of {', '.join(choices)}")


@dataclass
class StageSizes:
    """What a policy takes over from its stage-1 and stage-2 checkpoints; never typed.

    frames, feature_tokens, feature_channels, sentence_width: F, L, C of stage 1's features, P of its CLIP.
    """

    frames: int
    feature_tokens: int
    feature_channels: int
    sentence_width: int
    latent_action: LatentActionSizes


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
    """cross_attention: `full`, with a learned position per action, or `causal` as in the published weights:
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


@dataclass
class ActionDiffusionConfig:
    """Training σ: log-logistic around sigma_data. Sampling: `steps` levels, sigma_max … last_sigma, then 0.

    draws: (σ, noise) pairs per sample and training step, which share one encoded context (published: 1).
    sampler: ddim (published), dpmpp_2m or heun; heun calls the network twice per step.
    text_dropout: share of the training samples whose sentence embedding the head sees as zero (published: 0).
    guidance: scale of classifier-free guidance on the sentence embedding; 1: off, at no cost.
    fade: a chunk that goes on from one under way leaves it over so many actions at least; 0: at the latest
        where that one ends. 2 is smoother where answers take half a chunk, but the robot reacts later.
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
    fade: int = 0

    def __post_init__(self) -> None:
        dropout, guidance = self.text_dropout, self.guidance
        check_choice("policy.diffusion.sampler", self.sampler, SAMPLERS)
        check("policy.diffusion.steps", self.steps, self.steps >= 1, "must be 1 or more")
        check("policy.diffusion.text_dropout", dropout, 0 <= dropout < 1, "must lie in [0, 1)")
        check("policy.diffusion.fade", self.fade, self.fade >= 0, "must be 0 or more")
        rule = "the policy never saw a dropped text; set 1, or train with policy.diffusion.text_dropout=0.1"
        check("policy.diffusion.guidance", guidance, guidance == 1 or dropout > 0, rule)

    def sigma(self, u: Tensor) -> Tensor:
        """Noise levels of training from uniform u in [0, 1]."""
        middle, ends = math.log(self.sigma_data), {"minimum": self.sigma_min, "maximum": self.sigma_max}
        return log_logistic(u, loc=middle, scale=self.density_scale, **ends)

    def schedule(self, device: torch.device | str = "cpu") -> Tensor:
        """Noise levels of sampling, descending, 0 at the end."""
        sigma_max, sigma_min = self.sigma_max, self.last_sigma
        return exponential_schedule(self.steps, sigma_max=sigma_max, sigma_min=sigma_min, device=device)


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


@dataclass
class PolicyConfig:
    """What the policy is; `stages` is filled in by `DeFI` and kept in checkpoints.

    robot: what sees and acts; from the data, and what of it is given here instead.
    normalisation: of its actions and state: none, mean_std or bounds; None: as the data set has it (CALVIN
        none, as published, others bounds). state: whether it is a token of the action head (published: no).
    chunk: K, actions predicted at once.
    latent_actions: false leaves stage 2's branch out, to see what it is good for (published: true).
    latent_action_frames: the two imagined frames that stage 2's tokenizer looks at.
    feature_noise: `fresh` noise per observation, or the same (`fixed`) noise for all, which makes features a
    function of image and text (published: fresh). standardise: see `features.Standardise` (published: off).
    merge: side of the squares of neighbouring feature tokens that are joined into one (published: 1).
    restart_codes: codes that no sample of an epoch used are restarted (published: no).
    t5_dropout: T5 runs with its dropout while the policy trains (published, by an oversight).
    mixed_text_masks: as in stage 2 (`LatentActionEncoder`; published, a fault).
    gfdm_precision: what UNet and VAE of a frozen video model are kept and computed in, whatever the rest is
        computed in: no (as the rest), fp16 (published) or bf16.
    codebook_weight, commitment_weight: of the loss. finetune: whether the video model learns as well.
    """

    robot: Robot | None = None
    normalisation: str | None = None
    state: bool = False
    latent_actions: bool = True
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
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    stages: StageSizes | None = None

    def __post_init__(self) -> None:
        learning = self.finetune
        check_choice("policy.feature_noise", self.feature_noise, ("fresh", "fixed"))
        if self.normalisation is not None:
            check_choice("policy.normalisation", self.normalisation, NORMALISATIONS)
        check_choice("policy.gfdm_precision", self.gfdm_precision, PRECISIONS)
        check_choice(
            "policy.action_head.cross_attention", self.action_head.cross_attention, ("full", "causal")
        )
        check_choice("gfdm.finetune", learning.mode, ("none", "lora", "full"))
        check("gfdm.lora_rank", learning.rank, learning.rank >= 1, "must be 1 or more")
        fine = learning.video_loss == 0 or (learning.video_loss > 0 and learning.mode != "none")
        rule = "must be 0, or positive with gfdm.finetune=lora or full"
        check("gfdm.video_loss", learning.video_loss, fine, rule)
        if self.robot is not None:
            fine = not self.state or self.robot.state is not None
            check("policy.state", self.state, fine, "these data hold no state; leave it at false")
            executed = self.robot.executed
            fine, rule = executed is None or executed <= self.chunk, f"a chunk has {self.chunk} actions"
            check("policy.robot.executed", executed, fine, rule)
        if self.stages is not None:
            seen, last = self.latent_action_frames, self.stages.frames - 1
            rule = f"name two; the last frame that the stage-1 checkpoint imagines is {last}"
            fine = len(seen) == 2 and 0 <= min(seen) <= max(seen) <= last
            check("policy.latent_action_frames", seen, fine, rule)
            side = math.isqrt(self.stages.feature_tokens)
            fine, rule = self.merge >= 1 and side % self.merge == 0, f"must divide {side}, the features' side"
            check("policy.merge", self.merge, fine, rule)

    @property
    def views(self) -> int:
        """V: the robot's cameras."""
        return len(self.robot.cameras)

    @property
    def action_dim(self) -> int:
        """A: the numbers of an action."""
        return len(self.robot.actions)

    @property
    def state_dim(self) -> int | None:
        """S: the numbers of the state; None where the policy does not read it."""
        return len(self.robot.state.names) if self.state else None

    @property
    def video_precision(self) -> str:
        """`gfdm_precision`, but for a video model that learns, which needs float32."""
        return self.gfdm_precision if self.finetune.mode == "none" else "no"

    @classmethod
    def from_preset(cls, cfg: Mapping[str, Any], robot: Robot | None = None) -> "PolicyConfig":
        """From a composed configuration: its section `policy`, for the `robot` of the data.

        What `policy.robot` names is changed: {executed: 5, fps: 10}, say.
        """
        changes = cfg["policy"].get("robot")
        return typed(cls, {**cfg["policy"], "robot": robot and change(robot, changes)}, "policy")

    @classmethod
    def read(cls, file: Path) -> "PolicyConfig":
        """From a checkpoint's config.json; in older ones stage sizes and positions lay among the settings,
        and the robot was CALVIN's.

        Raises:
            UserError: the file is missing or damaged, a value does not fit, or the older positions do not go
                with the cross-attention.
        """
        values = read_json(file, COPY_AGAIN)
        check_sizes(values, file)
        if older := {each.name: values.pop(each.name) for each in fields(StageSizes) if each.name in values}:
            values["stages"] = older
        seen = values.pop("views", 2), values.pop("action_dim", 7)
        if values.get("robot") is None:
            check(f"{file}: views, action_dim", seen, seen == (2, 7), "of an unknown robot; train it again")
            values["robot"] = asdict(calvin_robot())
        head = values.get("action_head")
        if isinstance(head, dict) and "action_positions" in head:
            positions, kind = head.pop("action_positions"), head.get("cross_attention", "full")
            if positions != (kind == "full"):
                raise UserError(
                    f"{file}: cross_attention={kind} with action_positions={positions} is no longer "
                    "possible (full needs positions, causal has none); train it again"
                )
        return typed(cls, values, str(file))

    def fake_batch(self, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Valid training input from stored features."""
        generator, of = torch.Generator().manual_seed(seed), self.stages
        shape = (batch_size, self.views, of.frames, of.feature_tokens, of.feature_channels)
        features = torch.randn(shape, generator=generator)
        actions = torch.rand(batch_size, self.chunk, self.action_dim, generator=generator) * 2 - 1
        batch = {
            "features": features,
            "text": [f"push block number {i} to the left" for i in range(batch_size)],
            "actions": self.robot.actions.restore(actions),
            "seed": torch.arange(batch_size),
        }
        if self.state:
            state = torch.randn(batch_size, self.state_dim, generator=generator)
            batch["state"] = self.robot.state.restore(state)
        return batch


def change(robot: Robot, changes: Mapping[str, Any] | None) -> Robot:
    """A robot with what the section `policy.robot` says otherwise; what is null there stays.

    Raises:
        UserError: a value of another type, or cameras, actions or state other than the data's.
    """
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    changed = typed(Robot, OmegaConf.merge(asdict(robot), given), "policy.robot")
    fix = "choose and name them with data.cameras=[name:place in the data]"
    check("policy.robot.cameras", changed.cameras, changed.cameras == robot.cameras, fix)
    for name in ("actions", "state"):
        before, after = (len(getattr(each, name) or ()) for each in (robot, changed))
        rule = f"the data have {before} (data.{name})"
        check(f"policy.robot.{name}", f"{after} numbers", after == before, rule)
    return changed


# Presets and commands change settings that are here by name: `stage3: defaults` in configs/step3_*.yaml.
OPEN = {"fps": None, "executed": None, "gripper": None}  # of the robot, what the data may leave open
ConfigStore.instance().store("defaults", asdict(PolicyConfig()) | {"robot": OPEN}, "stage3", package="policy")
