"""Train the policy on prepared stores, or straight on the data of any robot.

    python -m Step3_DeFI.train output=<run> data.store=<store> gfdm_checkpoint=<run> gidm_checkpoint=<run>
    python -m Step3_DeFI.train output=<run> data=lerobot data.root=<folder> gfdm_checkpoint=… gidm_…=…

Runs under `accelerate launch` unchanged. Settings: configs/step3_train.yaml.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from defi.benchmarks.find import offer
from defi.config import entry, flatten
from defi.engine.checkpoint import continues, find_weights, read_run_config
from defi.engine.config import TrainerConfig, run_settings
from defi.engine.loop import train
from defi.engine.model import CONFIG
from defi.engine.output import check_output
from defi.errors import UserError
from defi.processes import print_once
from defi.robot.spec import Robot
from Step3_DeFI.config import PolicyConfig, check
from Step3_DeFI.policy import DeFI
from Step3_DeFI.preview import action_previews, rollouts
from Step3_DeFI.samples import as_read, check_same_robot, fit_robot, spread
from Step3_DeFI.store import Source, build_samples, members, open_sources

FAR = 1.5  # so many times as far is not worth a line


def robot_of(cfg: DictConfig, sources: Mapping[str, Mapping[str, Source]]) -> Robot:
    """What the policy will see and do: as the training data say; of a run that goes on, as it was.

    Raises:
        UserError: some of the data are of another robot; what differs is named.
    """
    sets = {name: source.data for name, source in sources["training"].items()}
    state, normalisation = cfg.policy.state, cfg.policy.normalisation
    robot = fit_robot(sets, normalisation, cfg.policy.robot, state=state)
    first = as_read(next(iter(sets.values())).robot(), state)
    for name, source in sources.get("held_out", {}).items():
        check_same_robot(first, as_read(source.data.robot(), state), f"{name}, held out", "the training data")
    if continues(cfg.output, cfg.resume):  # it normalises as it did
        kept = PolicyConfig.read(find_weights(cfg.output, DeFI.stage) / CONFIG).robot
        check_same_robot(as_read(kept, state), robot, "the training data", str(cfg.output))
        fine = normalisation is None or robot.actions.normalisation == kept.actions.normalisation
        check("policy.normalisation", normalisation, fine, f"{cfg.output} began with another; leave it out")
        return kept
    return robot


def tell_reach(config: PolicyConfig, frame_step: int, gidm: str) -> None:
    """Print how far ahead the latent action looks; and if the pairs that stage 2 learned from, as far as its
    run says, were much closer or farther."""
    frames, fps = config.latent_action_frames, config.robot.fps
    ahead = [frame * frame_step for frame in frames]
    seconds = f" ({', '.join(f'{steps / fps:.2g}' for steps in ahead)} s)" if fps else ""
    steps = ", ".join(f"+{each}" for each in ahead)
    print_once(f"latent actions come from imagined frames {frames}: {steps} steps of the recording{seconds}")
    trained: dict[str, Any] = {}
    with suppress(UserError):  # of weights alone nothing is known
        trained = flatten(read_run_config(gidm))
    match trained.get("data.distance") or trained.get("data.pair_distance"):
        case [int(low), int(high)] if not low / FAR <= ahead[1] - ahead[0] <= high * FAR:
            fix = "gfdm.frame_step (stage 1) and policy.latent_action_frames bring them together"
            print_once(f"stage 2 learned from frames that are {low} to {high} steps apart; {fix}")


def train_policy(cfg: DictConfig) -> Path:
    """Check everything, then train; returns the last checkpoint's folder."""
    check_output(cfg.output, resume=cfg.resume, overwrite=cfg.overwrite)
    trainer = TrainerConfig.from_config(cfg.trainer)
    sources = {"training": open_sources(cfg.data, "training")}
    if trainer.preview_every and (held_out := open_sources(cfg.data, "held_out")):
        sources["held_out"] = held_out
    config = PolicyConfig.from_preset(cfg, robot_of(cfg, sources))
    evaluate = rollouts(cfg, config) if trainer.rollout_every else None
    torch.manual_seed(cfg.seed)
    policy = DeFI.from_stages(config, gfdm=cfg.gfdm_checkpoint, gidm=cfg.gidm_checkpoint)
    video = policy.gfdm.config
    tell_reach(config, video.frame_step, cfg.gidm_checkpoint)
    # For the video loss the frames that follow a sample, of what is trained on.
    clips = {"training": video.clip_frames if config.finetune.video_loss else None}
    samples = {part: build_samples(sets, policy, clips.get(part)) for part, sets in sources.items()}
    texts = (text for part in samples.values() for each in members(part) for text in each.texts)
    print_once(policy.gfdm.clip.truncation_note(texts))
    if not continues(cfg.output, cfg.resume):
        policy.fit_standardisation(spread(samples["training"], 512, cfg.seed))
    return train(
        policy,
        samples["training"],
        trainer,
        **run_settings(cfg),
        preview=action_previews(samples, cfg.shown, cfg.seed) if trainer.preview_every else None,
        evaluate=evaluate,
    )


@entry("step3_train", offer)
def main(cfg: DictConfig) -> None:
    train_policy(cfg)


if __name__ == "__main__":
    main()
