"""DeFI as a framework of starVLA: a policy that `defi.checkpoints.export format=starvla` wrote.

Link this file to starVLA/model/framework/WM4A/DeFI.py, where starVLA looks for frameworks, or import it
before `build_framework`. starVLA's environment must hold DeFI as well: `pip install --no-deps -e <DeFI>`.

Its normalised actions are what the policy's networks see, and `dataset_statistics.json` says how starVLA
makes the robot's units of them. The state is given in the robot's units, in training as well.
"""

from typing import Any

import numpy as np
import torch
from starVLA.dataloader.gr00t_lerobot import registry
from starVLA.dataloader.gr00t_lerobot.embodiment_tags import EmbodimentTag
from starVLA.dataloader.gr00t_lerobot.transform.base import ComposedModalityTransform
from starVLA.dataloader.gr00t_lerobot.transform.state_action import StateActionToTensor, StateActionTransform
from starVLA.model.framework.base_framework import FRAMEWORK_REGISTRY, baseframework

from defi.engine.weights import load_strict
from defi.errors import UserError
from defi.robot.spec import Robot
from Step3_DeFI.acting import Policy
from Step3_DeFI.observation import observe

SEEDS = 2**62


class RobotData:
    """What starVLA's server asks to un-normalise: the numbers of an action, and how each was normalised.

    Each one as value · std + mean, whatever DeFI did: the exported statistics are made for that.
    """

    embodiment_tag = EmbodimentTag.NEW_EMBODIMENT

    def __init__(self, robot: Robot, *, reads_state: bool) -> None:
        self.action_keys = [f"action.{name}" for name in robot.actions.names]
        self.state_keys = [f"state.{name}" for name in robot.state.names] if reads_state else []

    def transform(self) -> ComposedModalityTransform:
        keys, modes = self.action_keys, dict.fromkeys(self.action_keys, "mean_std")
        normalise = StateActionTransform(apply_to=keys, normalization_modes=modes)
        return ComposedModalityTransform(transforms=[StateActionToTensor(apply_to=keys), normalise])


@FRAMEWORK_REGISTRY.register("DeFI")
class DeFIFramework(baseframework):
    """A policy and what it stands on, from the exported folder that `framework.policy` names.

    An example: `image`, a picture per camera in the order of `robot.cameras` (PIL, or uint8 [H, W, 3], any
    size); `lang`; `state` [S] or [1, S] where the policy reads it; for a loss `action` [≥ K, A], normalised,
    of which the last K count.
    """

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.config, settings = config, config.framework
        try:
            self.acting = Policy.load(settings.policy, precision=getattr(settings, "precision", None))
        except UserError as error:
            fix = "give the exported folder, --config_override framework.policy=… of starVLA's server"
            raise UserError(f"framework.policy={settings.policy}: {error}; {fix}") from None
        self.model = self.acting.model
        self.model.config.finetune.video_loss = 0.0  # examples hold no pictures of later
        self.robot = self.acting.robot
        mix = config.datasets.vla_data.data_mix
        if mix not in registry.DATASET_NAMED_MIXTURES:  # the exported one, not a data set of starVLA's
            registry.DATASET_NAMED_MIXTURES[mix] = [(mix, 1.0, mix)]
            registry.ROBOT_TYPE_CONFIG_MAP[mix] = RobotData(self.robot, reads_state=self.model.config.state)

    def forward(self, examples: list[dict[str, Any]], **_: Any) -> dict[str, torch.Tensor]:
        """`action_loss`, all that DeFI's stage 3 minimises: it goes back into all but the frozen networks."""
        seen = [self._observation(example) for example in examples]
        size, chunk = self.model.image_size, self.model.config.chunk
        actions = np.stack([np.asarray(example["action"], np.float32)[-chunk:] for example in examples])
        batch = {
            "images": torch.stack([observe(each["images"], self.robot.cameras, size) for each in seen]),
            "text": [each["instruction"] for each in seen],
            "actions": torch.from_numpy(self.robot.actions.restore(actions)).to(self.model.device),
            "seed": torch.randint(SEEDS, (len(examples),)),
        }
        if self.model.config.state:
            batch["state"] = torch.from_numpy(np.stack([each["state"] for each in seen]))
        return {"action_loss": self.model(batch)["loss"]}

    def predict_action(
        self, examples: list[dict[str, Any]], seeds: list[int] | None = None, **_: Any
    ) -> dict[str, np.ndarray]:
        """`normalized_actions` float32 [B, K, A], the gripper at one of its two values.

        seeds: of the noise, one per example, as `Policy.infer` takes it; None: from PyTorch's generator.
        """
        if seeds is None:
            seeds = torch.randint(SEEDS, (len(examples),)).tolist()
        training = self.model.training
        self.model.eval()
        actions = self.acting.infer_batch([self._observation(each) for each in examples], seeds)
        self.model.train(training)
        return {"normalized_actions": self.robot.actions.normalise(actions)}

    def _observation(self, example: dict[str, Any]) -> dict[str, Any]:
        cameras, pictures = self.robot.cameras, example["image"]
        if len(pictures) != len(cameras):
            seen = f"this policy sees {len(cameras)}: {', '.join(cameras)}"
            raise UserError(f"image: {len(pictures)} pictures; {seen}")
        images = {camera: np.array(picture) for camera, picture in zip(cameras, pictures)}
        seen = {"images": images, "instruction": example["lang"]}
        if self.model.config.state and "state" in example:
            seen["state"] = np.asarray(example["state"], np.float32).reshape(-1)
        return seen

    # What is trained, by the names that it has in `checkpoints/`; the rest stays in `framework.policy`.

    def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        return self.model.own_state()

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], *_: Any, **__: Any) -> None:
        load_strict(self.model.own_state(), state_dict, source="checkpoint")
