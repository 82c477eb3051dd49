"""Train the policy on a prepared store, or straight on demonstrations in CALVIN's format.

    python -m Step3_DeFI.train output=<run> data.store=<store> gfdm_checkpoint=<run> gidm_checkpoint=<run>
    python -m Step3_DeFI.train output=<run> data.root=<folder or zip> gfdm_checkpoint=… gidm_checkpoint=…

Runs under `accelerate launch` unchanged. Settings: configs/step3_train.yaml.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig

from defi.config import entry
from defi.data.calvin import calvin_robot
from defi.engine.checkpoint import continues
from defi.engine.config import TrainerConfig, run_settings
from defi.engine.loop import train
from defi.engine.output import check_output
from defi.processes import print_once
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.preview import action_previews, rollouts
from Step3_DeFI.store import open_samples


def train_policy(cfg: DictConfig) -> Path:
    """Check everything, then train; returns the last checkpoint's folder."""
    check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    trainer = TrainerConfig.from_config(cfg.trainer)
    config = PolicyConfig.from_preset(cfg, calvin_robot())
    torch.manual_seed(cfg.seed)
    policy = DeFI.from_stages(config, gfdm=cfg.gfdm_checkpoint, gidm=cfg.gidm_checkpoint)
    frames, apart = config.latent_action_frames, policy.gfdm.config.frame_step
    ahead = ", ".join(f"+{frame * apart}" for frame in frames)
    print_once(f"latent actions come from imagined frames {frames}: {ahead} steps of the recording")
    samples = open_samples(cfg.data, policy)
    print_once(policy.gfdm.clip.truncation_note(text for part in samples.values() for text in part.texts))
    if not continues(cfg.output, cfg.resume):
        policy.fit_standardisation(samples["training"].spread(512, cfg.seed))
    return train(
        policy,
        samples["training"],
        trainer,
        **run_settings(cfg),
        preview=action_previews(samples, cfg.data.shown, cfg.seed) if trainer.preview_every else None,
        evaluate=rollouts(cfg) if trainer.rollout_every else None,
    )


@entry("step3_train")
def main(cfg: DictConfig) -> None:
    train_policy(cfg)


if __name__ == "__main__":
    main()
