"""Train the policy on a prepared store.

    python -m Step3_DeFI.train output=<run> data.store=<store> gfdm_checkpoint=<run> gidm_checkpoint=<run>

Runs under `accelerate launch` unchanged. Settings: configs/step3_train.yaml.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import default_collate

from defi.config import entry, typed
from defi.engine.checkpoint import continues, find_weights
from defi.engine.config import TrainerConfig
from defi.engine.fingerprint import fingerprint
from defi.engine.loop import Inspect, train
from defi.engine.output import check_output
from defi.errors import UserError
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.data import PolicyStore
from Step3_DeFI.policy import DeFI

matplotlib.use("Agg")

import matplotlib.pyplot as plt

FITTED = 512  # samples that the features' mean and deviation are taken from
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


def check_store(store: PolicyStore, policy: PolicyConfig, gfdm: Path, image_size: int) -> None:
    """Refuse a store made for other sizes, another stage-1 checkpoint, other noise, or without finetuning.

    Raises:
        UserError: names what the store has and what the policy expects.
    """
    made = store.manifest
    if made.kind == "features" and policy.finetune.mode != "none":
        raise UserError(
            f"{store.folder}: stored features have no gradient for gfdm.finetune={policy.finetune.mode}; "
            "prepare a store with store.kind=latents, or leave finetune at none"
        )
    expected: dict[str, tuple[object, object]] = {"chunk": (made.chunk, policy.chunk)}
    if made.kind == "features":
        shape = [policy.views, policy.frames, policy.feature_tokens, policy.feature_channels]
        expected["features"] = (made.look, shape)
        expected["feature_noise"] = (made.feature_noise, policy.feature_noise)
    expected["image_size"] = (made.image_size, image_size)
    if made.kind != "images":
        expected["stage-1 weights"] = (made.gfdm, fingerprint(gfdm))
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise UserError(
                f"{store.folder}: prepared with {name} {found}, the policy expects {wanted}; prepare it again"
            )


def check_videos(store: PolicyStore, policy: PolicyConfig) -> None:
    """Refuse a store to train from that lacks the videos which a video loss needs."""
    if policy.finetune.video_loss and (store.video is None or store.video.shape[1] != policy.frames):
        raise UserError(
            f"{store.folder}: holds no videos of {policy.frames} frames for gfdm.video_loss; "
            "prepare it with store.video_stride=2, or leave video_loss at 0"
        )


def spread(store: PolicyStore, count: int) -> dict[str, Any]:
    """A batch of samples from all over a store."""
    picked = np.linspace(0, len(store) - 1, min(count, len(store))).round().astype(int)
    batch = default_collate([store[int(i)] for i in picked])
    return batch | {"seed": torch.arange(len(picked))}


def sampler(stores: dict[str, PolicyStore], count: int, seed: int) -> Inspect:
    """Pictures of predicted and expert actions, and the error of the policy's chunks, on fixed samples.

    `stores`: by name ("training", "held_out"); `count` samples, evenly spread, are taken of each.
    """
    batches = {name: spread(store, count) for name, store in stores.items()}

    def sample(policy: DeFI, step: int, folder: Path) -> dict[str, float]:
        numbers = {}
        for name, batch in batches.items():
            predicted = policy.predict(batch | {"seed": batch["seed"] + seed}).cpu()
            expert = batch["actions"]
            numbers[f"{name}_action_error"] = (predicted - expert).square().mean().item()
            right = (predicted[..., -1] > 0) == (expert[..., -1] > 0)
            numbers[f"{name}_gripper_right"] = right.float().mean().item()
            draw_actions(predicted, expert, batch["text"], folder / f"{name}.png")
        return numbers

    return sample


def draw_actions(predicted: Tensor, expert: Tensor, texts: list[str], file: Path, *, rows: int = 6) -> None:
    """One row per sample, one panel per action dimension: the expert's chunk and the policy's."""
    rows = min(rows, len(texts))
    figure, axes = plt.subplots(
        rows, predicted.shape[-1], figsize=(14, 1.6 * rows), sharex=True, sharey=True, squeeze=False
    )
    for row in range(rows):
        for dim, axis in enumerate(axes[row]):
            axis.plot(expert[row, :, dim], color="0.6", label="expert")
            axis.plot(predicted[row, :, dim], color="tab:blue", label="policy")
            axis.set_ylim(-1.3, 1.3)
            if row == 0:
                axis.set_title(ACTION_NAMES[dim] if dim < len(ACTION_NAMES) else str(dim), fontsize=9)
        axes[row][0].set_ylabel(texts[row][:24], fontsize=6)
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def roller(cfg: DictConfig) -> Inspect:
    """Small rollouts at intervals; imports the simulation only where they are asked for."""
    from Step3_DeFI.rollout.config import RolloutConfig
    from Step3_DeFI.rollout.evaluate import Evaluation
    from Step3_DeFI.rollout.policy import evaluate_policy

    config = typed(RolloutConfig, {**cfg.rollout, "sim": cfg.sim}, "rollout")
    evaluation = Evaluation.prepare(config)
    return lambda policy, step, folder: evaluate_policy(policy, evaluation, output=folder)


def train_policy(cfg: DictConfig) -> Path:
    """Check everything, then train; returns the last checkpoint's folder."""
    check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    trainer = TrainerConfig.from_config(cfg.trainer)
    config = PolicyConfig.from_preset(cfg)
    stores = {"training": PolicyStore(cfg.data.store)}
    if cfg.data.held_out is not None:
        stores["held_out"] = PolicyStore(cfg.data.held_out)
    torch.manual_seed(cfg.seed)
    policy = DeFI.from_stages(config, gfdm=cfg.gfdm_checkpoint, gidm=cfg.gidm_checkpoint)
    for store in stores.values():
        check_store(store, config, find_weights(cfg.gfdm_checkpoint, "gfdm"), policy.image_size)
    check_videos(stores["training"], config)
    if not continues(cfg.output, cfg.resume):
        policy.fit_standardisation(spread(stores["training"], FITTED))
    return train(
        policy,
        stores["training"],
        trainer,
        output=cfg.output,
        config=OmegaConf.to_container(cfg, resolve=True),
        seed=cfg.seed,
        resume=cfg.resume,
        overwrite=cfg.overwrite,
        tracker=cfg.tracker,
        sample=sampler(stores, cfg.data.shown, cfg.seed) if trainer.sample_every else None,
        evaluate=roller(cfg) if trainer.rollout_every else None,
    )


@entry("step3_train")
def main(cfg: DictConfig) -> None:
    train_policy(cfg)


if __name__ == "__main__":
    main()
