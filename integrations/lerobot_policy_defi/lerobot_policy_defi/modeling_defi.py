"""A DeFI policy as LeRobot's: its loss for lerobot-train, its actions for lerobot-eval and lerobot-rollout.

A checkpoint, and what `defi.checkpoints.export format=lerobot` writes:

config.json, policy_{pre,post}processor.json   LeRobot's
model.safetensors                              the trained weights, the file in defi/ once more (a hard link)
defi/                                          the policy, whole: `Step3_DeFI.acting.Policy.load` takes it
"""

import logging
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies import PreTrainedPolicy
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import default_collate

from defi.checkpoints.export_lerobot import share_files
from defi.data import Dataset
from defi.data.lerobot.meta import Meta
from defi.data.motions import Motions
from defi.engine.checkpoint import NESTED, RUN_CONFIG, environment, read_manifest, write_manifest
from defi.engine.data import seed_of
from defi.engine.model import WEIGHTS, StageModel
from defi.errors import UserError
from defi.hub import local_folder
from defi.robot.chunk import UnderWay
from defi.robot.spec import Robot, Vector
from lerobot_policy_defi.configuration_defi import DeFIConfig, camera_of, compose
from Step3_DeFI.acting import Policy
from Step3_DeFI.config import PRECISIONS, PolicyConfig, change
from Step3_DeFI.observation import observe
from Step3_DeFI.policy import DeFI
from Step3_DeFI.stages import TEXT, VIDEO, write_whole

STATE, ACTION = "observation.state", "action"
SHOWN = 512  # samples that the features' mean and deviation are taken from


def new_model(config: DeFIConfig, recorded: LeRobotDataset) -> DeFI:
    """A policy that is to be trained, for the robot of a data set; its features are not standardised yet."""
    for setting in config.settings:
        if setting.startswith(("trainer.", "policy.chunk=", "gfdm.video_loss=")):
            instead = "LeRobot has --optimizer.… and --policy.chunk, and loads no frames for a video loss"
            raise UserError(f"policy.settings: {setting}: leave it out; {instead}")
    cfg = compose(config.preset, f"policy.chunk={config.chunk}", *config.settings)
    own = PolicyConfig.from_preset(cfg, robot_of(cfg, recorded))
    return DeFI.from_stages(own, gfdm=config.gfdm, gidm=config.gidm).to(config.device)


def robot_of(cfg: DictConfig, recorded: LeRobotDataset) -> Robot:
    """As DeFI's own training makes it: names and rate of the data, statistics of all rows by DeFI's rules.

    LeRobot's quantiles (stats.json) are averages over episodes, not those of the data: they are not used.
    """
    meta = Meta(Path(recorded.root))
    cameras = list(cfg.data.cameras or map(camera_of, meta.pictures))
    actions, state = (meta.vector(key, key, what)[1] for key, what in ((ACTION, "actions"), (STATE, "state")))
    read = {ACTION: actions} | ({STATE: state} if state and cfg.policy.state else {})
    rows = recorded.hf_dataset.select_columns(list(read)).with_format("numpy")[:]
    vectors = {key: np.asarray(rows[key], np.float32).reshape(-1, len(names)) for key, names in read.items()}
    motions = Motions(np.arange(len(vectors[ACTION])), vectors[ACTION], vectors.get(STATE, np.empty((0, 0))))
    robot = Robot(cameras, Vector.plain(actions), Vector.plain(state) if STATE in read else None, meta.fps)
    return change(robot, cfg.policy.robot).fitted(motions, cfg.policy.normalisation or Dataset.normalisation)


def recorded_data(config: DeFIConfig, dataset_meta: Any) -> LeRobotDataset:
    """What a new policy will be trained on. UserError: none, or nothing that the policy stands on."""
    if dataset_meta is None or not (config.gfdm and config.gidm):
        fix = "give --policy.path, or for a new one a data set, --policy.gfdm and --policy.gidm"
        raise UserError(f"defi: neither a checkpoint nor what a new policy is made from; {fix}")
    return LeRobotDataset(dataset_meta.repo_id, root=dataset_meta.root, video_backend="pyav")


class DeFIPolicy(PreTrainedPolicy):
    """See the module. `model` and `folder`, where it was read from, are given by `from_pretrained` alone."""

    config_class, name = DeFIConfig, "defi"

    def __init__(
        self,
        config: DeFIConfig,
        dataset_stats: dict[str, Any] | None = None,
        dataset_meta: Any = None,
        *,
        model: DeFI | None = None,
        folder: Path | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        config.validate_features()
        recorded = None if model else recorded_data(config, dataset_meta)
        self.defi = model or new_model(config, recorded)
        self._folder, self._looks, self._last = folder, 0, np.empty((0, 0))  # the last chunk [K, A]
        self.steps = read_manifest(folder)["step"] if folder else 0
        own = self.defi.config
        self._check(own.chunk)
        config.keep_inputs(own.robot.cameras, own.state)
        self._keys = config.cameras()
        if recorded is not None and own.standardise:
            picked = np.linspace(0, len(recorded) - 1, min(SHOWN, len(recorded))).round().astype(int).tolist()
            shown = [self._inputs(default_collate([recorded[i]])) for i in picked]
            images, seeds = (torch.cat([each[key] for each in shown]) for key in ("images", "seed"))
            texts = [text for each in shown for text in each["text"]]
            self.defi.fit_standardisation({"images": images, "text": texts, "seed": seeds})
        self._policy = Policy(self.defi, **config.acting())
        self.reset()

    def _check(self, chunk: int) -> None:
        """What LeRobot was told of the policy must be true."""
        robot, told = self.defi.config.robot, self.config
        if told.chunk != chunk:
            raise UserError(f"policy.chunk={told.chunk}: this checkpoint has chunks of {chunk}")
        if missing := set(robot.cameras) - told.cameras().keys():
            seen = f"defi: no camera {min(missing)} among {', '.join(told.cameras())}"
            raise UserError(f"{seen}; name cameras as the data do, or give --rename_map")
        if told.action_feature.shape != (len(robot.actions),):
            raise UserError(f"defi: has {len(robot.actions)} actions, not {told.action_feature.shape}")
        named = told.action_feature_names
        if named and named != robot.actions.names:
            logging.warning("defi: actions are %s, here called %s", robot.actions.names, named)
        if not 0 < (told.n_action_steps or 1) <= chunk:
            raise UserError(f"policy.n_action_steps={told.n_action_steps}: a chunk has {chunk} actions")

    # ------------------------------------------------------------ checkpoints

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **given: Any
    ) -> "DeFIPolicy":
        """A checkpoint of lerobot-train or an export, a folder or `user/name` on the hub; in eval mode."""
        folder = local_folder(pretrained_name_or_path, given.get("revision"))
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        inside = folder / NESTED
        model, precision = DeFI.from_pretrained(inside).to(config.device), config.acting()["precision"]
        if precision != "no" and "dataset_meta" not in given:  # to act, as `Policy.load` does
            torch.nn.Module.to(model.gfdm.unet, PRECISIONS[precision])
        return cls(config, model=model, folder=inside).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Whole. The frozen networks are written once, then shared between a run's checkpoints."""
        if state_dict is not None:
            raise UserError("defi: LeRobot's FSDP is not supported; DeFI's own training has it (docs)")
        self.config._save_pretrained(save_directory)
        (inside := save_directory / NESTED).mkdir(parents=True, exist_ok=True)
        if self._folder is None:
            write_whole(self.defi, inside)
        else:
            StageModel.save_pretrained(self.defi, inside)
            for name in (VIDEO, TEXT):
                share_files(self._folder / name, inside / name)
        run = {"preset_name": self.config.preset, "trainer": {"precision": self.config.acting()["precision"]}}
        (inside / RUN_CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(run)))
        made = {"stage": DeFI.stage, "preset": self.config.preset, "step": self.steps}
        write_manifest(inside, environment() | made | {"data": {}, "metrics": {}})
        share_files(inside / WEIGHTS, save_directory / WEIGHTS)
        self._folder = inside

    # ------------------------------------------------------------ training

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.defi.trainable()]

    def update(self) -> None:
        """LeRobot calls this after each step of the optimizer."""
        self.steps += 1
        self.defi.step_end()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """DeFI's loss of a batch: images [B, 3, H, W] in [0, 1], action [B, K, A], task: B strings.

        action_is_pad [B, K]: rows whose chunk ends after the episode are left out, as DeFI's own training has
        none. Where all of them do, the loss is 0, with gradients of 0.
        """
        inputs = self._inputs(batch) | {"actions": batch[ACTION].to(self.defi.device)}
        if "action_is_pad" in batch:
            whole = (~batch["action_is_pad"].any(dim=1)).nonzero().flatten().tolist()
            inputs = {
                key: [rows[i] for i in whole] if key == "text" else rows[whole]
                for key, rows in inputs.items()
            }
            if not whole:
                return 0 * torch.stack([each.sum() for each in self.get_optim_params()]).sum(), {}
        losses = self.defi(inputs)
        return losses["loss"], {key: part.item() for key, part in losses.items() if key != "loss"}

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What DeFI looks at, as it takes it. The noise is of frame and step, so that resuming is exact."""
        cameras, size = self.defi.config.robot.cameras, self.defi.image_size
        seen = self._observations(batch)
        frames = torch.as_tensor(batch.get("index", range(len(seen)))).tolist()
        seeds = [seed_of("lerobot", self.config.seed, self.steps, frame) for frame in frames]
        inputs = {
            "images": torch.stack([observe(each["images"], cameras, size) for each in seen]),
            "text": [each["instruction"] for each in seen],
            "seed": torch.tensor(seeds),
        }
        return inputs | ({"state": batch[STATE]} if self.defi.config.state else {})

    # ------------------------------------------------------------ acting

    def reset(self) -> None:
        """A new episode: what is left of the chunk is forgotten."""
        self._left: deque[Tensor] = deque()

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action [B, A]; looks again once those of a chunk that are carried out are used up."""
        if not self._left:
            executed = self.config.n_action_steps or self.defi.config.robot.executed
            self._left.extend(self.predict_action_chunk(batch)[:, :executed].unbind(dim=1))
        return self._left.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        *,
        inference_delay: int = 0,
        prev_chunk_left_over: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The next actions [B, K, A] in the robot's units, on the CPU.

        prev_chunk_left_over: [T, A], for B = 1: what lies ahead of the last chunk. inference_delay: so many
            of these will have been carried out when the answer is there, which begins with them.
        """
        self.eval()
        seen = self._observations(batch)
        seeds = [seed_of("act", self.config.seed, self._looks, row) for row in range(len(seen))]
        self._looks += 1
        settings = getattr(self.config, "rtc_config", None)
        goes_on = settings is None or settings.enabled  # if not, LeRobot puts chunks behind each other
        ahead = under_way(prev_chunk_left_over, inference_delay, self._last) if goes_on else None
        actions = self._policy.infer_batch(seen, seeds, None if ahead is None else [ahead])
        self._last = actions[0].copy()
        return torch.from_numpy(actions)

    def supports_rtc(self) -> bool:
        return True

    def init_rtc_processor(self) -> None:
        """LeRobot calls this before real-time chunking. The first look takes longest, and would count as the
        latency of those that follow: here it is."""
        robot, size = self.defi.config.robot, self.defi.image_size
        images = {name: np.zeros((size, size, 3), np.uint8) for name in robot.cameras}
        state = np.zeros(self.defi.config.state_dim or 0)
        self._policy.infer({"images": images, "instruction": "", "state": state})

    def _observations(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of a batch as `Policy` takes them."""
        robot = self.defi.config.robot
        if missing := [self._keys[name] for name in robot.cameras if self._keys[name] not in batch]:
            raise UserError(f"defi: the batch lacks {', '.join(missing)}; see --rename_map")
        pictures = {name: as_uint8(batch[self._keys[name]]) for name in robot.cameras}
        texts = batch.get("task") or [""] * len(pictures[robot.cameras[0]])  # simulators may have no words
        rows: list[dict[str, Any]] = [{"instruction": text or self.config.instruction} for text in texts]
        for row, each in enumerate(rows):
            each["images"] = {name: pictures[name][row] for name in robot.cameras}
        if self.defi.config.state:
            for row, state in zip(rows, batch[STATE].float().cpu().numpy(), strict=True):
                row["state"] = state
        return rows


def as_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W], uint8 or in [0, 1] → uint8 [B, H, W, 3]: exactly what LeRobot divided by 255."""
    if images.dtype != torch.uint8:
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def under_way(left_over: Tensor | None, delay: int, last: np.ndarray) -> UnderWay | None:
    """What lies ahead, from what LeRobot has left over of the chunk `last` [K, A], cut to a fixed length or
    filled up with zeros. The chunk tells these from its own zeros, those of a robot that stands still."""
    if left_over is None:
        return None
    actions = left_over.float().cpu().numpy()
    pieces = [last[i : i + len(actions)] for i in range(len(last))]
    fits = [len(each) for each in pieces if np.array_equal(each, actions[: len(each)])]
    real = int(np.flatnonzero(actions.any(axis=1)).max(initial=-1)) + 1  # of another chunk
    if fits and max(fits) >= real:
        real = max(fits) if real else min(max(fits), delay)  # if all are zeros, nobody knows more than that
    return UnderWay(actions[:real], min(delay, real)) if real else None
