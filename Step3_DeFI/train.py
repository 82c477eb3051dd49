"""Train the policy on a prepared store, or straight on demonstrations in CALVIN's format.

    python -m Step3_DeFI.train output=<run> data.store=<store> gfdm_checkpoint=<run> gidm_checkpoint=<run>
    python -m Step3_DeFI.train output=<run> data.root=<folder or zip> gfdm_checkpoint=… gidm_checkpoint=…

Runs under `accelerate launch` unchanged. Settings: configs/step3_train.yaml.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import default_collate

from defi.calvin import TRAINING, VALIDATION
from defi.config import entry, typed
from defi.engine.checkpoint import continues, find_weights
from defi.engine.config import TrainerConfig, run_settings
from defi.engine.data import readable, sample_seeds
from defi.engine.loop import Inspect, train
from defi.engine.output import check_output
from defi.engine.weights import fingerprint
from defi.errors import UserError
from defi.processes import print_once
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.data import PolicySamples, PolicyStore
from Step3_DeFI.policy import DeFI
from Step3_DeFI.samples import CalvinSamples, following

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
        expected["policy.gfdm_precision"] = (made.gfdm_precision, policy.video_precision)
    expected["image_size"] = (made.image_size, image_size)
    if made.kind != "images":
        expected["stage-1 weights"] = (made.gfdm, fingerprint(gfdm))
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise UserError(
                f"{store.folder}: prepared with {name} {found}, the policy expects {wanted}; prepare it again"
            )


def check_videos(store: PolicyStore, policy: DeFI) -> None:
    """Refuse a store to train from that lacks the videos which a video loss needs."""
    frames, step = policy.config.frames, policy.gfdm.config.frame_step
    found = None if store.video is None else (store.video.shape[1], store.manifest.video_stride)
    if policy.config.finetune.video_loss and found != (frames, step):
        raise UserError(
            f"{store.folder}: holds no videos of {frames} frames, {step} apart, for gfdm.video_loss; "
            f"prepare it with store.videos=true gfdm.frame_step={step}, or leave video_loss at 0"
        )


def open_samples(section: DictConfig, policy: DeFI, gfdm: Path) -> dict[str, PolicySamples]:
    """`training`, and `held_out` where the section names some: stores, checked, or recordings as they are.

    gfdm: folder of the policy's stage-1 weights.

    Raises:
        UserError: the section names both kinds of data or none, or they are missing, damaged or do not fit.
    """
    if (section.store is None) == (section.root is None):
        raise UserError(
            f"data.store={section.store}, data.root={section.root}: give one of them, a store made by "
            "Step3_DeFI.prepare or demonstrations in CALVIN's format"
        )
    config, places = policy.config, {"training": section.store or f"{section.root}/{section.split}"}
    if section.held_out is not None:
        of_root = section.root is not None and section.held_out in (TRAINING, VALIDATION)
        places["held_out"] = f"{section.root}/{section.held_out}" if of_root else section.held_out
    if section.store is not None:
        stores = {name: PolicyStore(folder) for name, folder in places.items()}
        for store in stores.values():
            check_store(store, config, gfdm, policy.image_size)
        check_videos(stores["training"], policy)
        return stores
    clip = following(config.frames, policy.gfdm.config.frame_step if config.finetune.video_loss else None)
    cut = {"chunk": config.chunk, "tail": section.tail, "stride": section.stride, "spans": section.spans}
    return {
        name: CalvinSamples(
            folder, image_size=policy.image_size, video=clip if name == "training" else None, **cut
        )
        for name, folder in places.items()
    }


def spread(samples: PolicySamples, count: int, seed: int = 0) -> dict[str, Any]:
    """A batch of samples from all over a data set; those that cannot be read are left out."""
    picked = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    read = [sample for _, sample in readable(samples.__getitem__, picked.tolist())]
    return default_collate(read) | {"seed": sample_seeds("shown", seed, len(read))}


def previewer(sets: dict[str, PolicySamples], count: int, seed: int) -> Inspect:
    """Pictures of predicted and expert actions, and the error of the policy's chunks, on fixed samples.

    `sets`: by name ("training", "held_out"); `count` samples, evenly spread, are taken of each.
    """
    batches = {name: spread(samples, count, seed) for name, samples in sets.items()}

    def preview(policy: DeFI, step: int, folder: Path) -> dict[str, float]:
        numbers = {}
        for name, batch in batches.items():
            predicted = policy.predict(batch).cpu()
            expert = batch["actions"]
            numbers[f"{name}_action_error"] = (predicted - expert).square().mean().item()
            right = (predicted[..., -1] > 0) == (expert[..., -1] > 0)
            numbers[f"{name}_gripper_right"] = right.float().mean().item()
            draw_actions(predicted, expert, batch["text"], folder / f"{name}.png")
        return numbers

    return preview


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
    precision = cfg.trainer.precision
    return lambda policy, step, folder: evaluate_policy(
        policy, evaluation, precision=precision, output=folder
    )


def train_policy(cfg: DictConfig) -> Path:
    """Check everything, then train; returns the last checkpoint's folder."""
    check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    trainer = TrainerConfig.from_config(cfg.trainer)
    config = PolicyConfig.from_preset(cfg)
    torch.manual_seed(cfg.seed)
    policy = DeFI.from_stages(config, gfdm=cfg.gfdm_checkpoint, gidm=cfg.gidm_checkpoint)
    step, looks = policy.gfdm.config.frame_step, config.latent_action_frames
    ahead = ", ".join(f"+{frame * step}" for frame in looks)
    print_once(f"latent actions come from imagined frames {looks}: {ahead} steps of the recording")
    samples = open_samples(cfg.data, policy, find_weights(cfg.gfdm_checkpoint, "gfdm"))
    print_once(policy.gfdm.clip.told(text for part in samples.values() for text in part.texts))
    if not continues(cfg.output, cfg.resume):
        policy.fit_standardisation(spread(samples["training"], FITTED, cfg.seed))
    return train(
        policy,
        samples["training"],
        trainer,
        **run_settings(cfg),
        preview=previewer(samples, cfg.data.shown, cfg.seed) if trainer.preview_every else None,
        evaluate=roller(cfg) if trainer.rollout_every else None,
    )


@entry("step3_train")
def main(cfg: DictConfig) -> None:
    train_policy(cfg)


if __name__ == "__main__":
    main()
