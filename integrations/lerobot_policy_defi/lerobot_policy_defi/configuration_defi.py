"""LeRobot's settings of a DeFI policy, and DeFI's recipe as LeRobot's optimizer and scheduler."""

from dataclasses import dataclass, field, replace
from typing import Any

import hydra
from hydra.errors import CompactHydraException
from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from defi.config import CONFIG_DIR, explain, presets
from defi.engine.config import TrainerConfig
from defi.engine.optimizer import learning_rate
from defi.errors import UserError
from Step3_DeFI import config as _  # noqa: F401  (registers its part of the settings with Hydra)

PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # LeRobot's words, DeFI's


def compose(preset: str, *settings: str) -> DictConfig:
    """DeFI's settings of stage 3, as `python -m Step3_DeFI.train data=lerobot` has them."""
    if preset not in presets():
        raise UserError(f"policy.preset={preset}: choose from {', '.join(presets())}")
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base=None):
        # LeRobot says where the data lie and what is written.
        given = [f"preset={preset}", "data=lerobot", "data.root=''", "output=''", *settings]
        try:
            cfg = hydra.compose("step3_train", given)
        except CompactHydraException as error:
            raise UserError(f"policy.settings: {explain(error)}") from None
    OmegaConf.resolve(cfg)
    return cfg


def camera_of(feature: str) -> str:
    """The name that DeFI's reader of LeRobot's data gives the camera of a feature."""
    return feature.removeprefix("observation.").removeprefix("images.")


def recipe(preset: str) -> TrainerConfig:
    """The numbers of DeFI's own training of this preset."""
    return TrainerConfig.from_config(compose(preset).trainer)


@LRSchedulerConfig.register_subclass("defi")
@dataclass
class DeFISchedulerConfig(LRSchedulerConfig):
    """The learning rate as in DeFI's training with this preset, over the steps of LeRobot's."""

    num_warmup_steps: int | None = None  # the recipe has shares of the steps
    preset: str = "tiny"

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        numbers = replace(recipe(self.preset), lr=1.0, max_steps=num_training_steps)
        return LambdaLR(optimizer, lambda step: learning_rate(step, numbers))


@PreTrainedConfig.register_subclass("defi")
@dataclass
class DeFIConfig(PreTrainedConfig):
    """Of a new policy: gfdm, gidm, preset, settings, chunk. The rest may change from use to use.

    gfdm, gidm: stage-1 and stage-2 checkpoints that it stands on.
    preset: tiny, small, paper, …: DeFI's, with its learning rate and schedule.
    settings: more of DeFI's, as its command line has them: ["policy.state=true", "data.cameras=[top,wrist]"].
    chunk: K, actions predicted at once; a checkpoint's is its own.
    n_action_steps: of a chunk so many are carried out before the next look; None: as the policy's robot says.
    instruction: where LeRobot has none, as in simulators without words.
    dtype: of the computation, float32, float16 or bfloat16, in training and acting; `use_amp` has no say.
    sampler, num_inference_steps: of the actions' diffusion; None: as trained.
    seed: of the noise: of each frame and step in training, of each look when acting.
    action_feature_names: of the robot's actions, in their order; LeRobot maps actions by them.
    """

    gfdm: str | None = None
    gidm: str | None = None
    preset: str = "tiny"
    settings: list[str] = field(default_factory=list)
    chunk: int = 10
    n_action_steps: int | None = None
    instruction: str = ""
    dtype: str = "float32"
    sampler: str | None = None
    num_inference_steps: int | None = None
    seed: int = 0
    action_feature_names: list[str] | None = None
    # Actions and state are normalised inside the policy, by the robot in its checkpoint.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in PRECISIONS:
            raise UserError(f"policy.dtype={self.dtype}: choose from {', '.join(PRECISIONS)}")

    @property
    def observation_delta_indices(self) -> None:
        return None  # the present one alone

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk))

    @property
    def reward_delta_indices(self) -> None:
        return None

    @property
    def drop_n_last_frames(self) -> int:
        """At an episode's end no whole chunk follows; DeFI learns from whole ones alone."""
        return self.chunk - 1

    def get_optimizer_preset(self) -> AdamWConfig:
        numbers = recipe(self.preset)
        return AdamWConfig(
            lr=numbers.lr,
            betas=numbers.betas,
            weight_decay=numbers.weight_decay,
            grad_clip_norm=numbers.clip or 0.0,
        )

    def get_scheduler_preset(self) -> DeFISchedulerConfig:
        return DeFISchedulerConfig(preset=self.preset)

    def validate_features(self) -> None:
        if not self.image_features or self.action_feature is None:
            raise UserError("defi: the data need a camera and the feature `action`")

    def acting(self) -> dict[str, Any]:
        """As arguments for DeFI's `Policy`."""
        given = {"sampler": self.sampler, "steps": self.num_inference_steps}
        chosen = {key: value for key, value in given.items() if value is not None}
        return {"precision": PRECISIONS[self.dtype], **chosen}

    def cameras(self) -> dict[str, str]:
        """Camera → feature."""
        return {camera_of(key): key for key in self.image_features}

    def keep_inputs(self, cameras: list[str], state: bool) -> None:
        """Ask for what the policy reads, and for nothing else."""
        kept = {self.cameras().get(camera) for camera in cameras}
        self.input_features = {
            key: each
            for key, each in self.input_features.items()
            if key in kept or (state and each.type is FeatureType.STATE)
        }
