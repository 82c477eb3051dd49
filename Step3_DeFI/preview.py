"""Previews while the policy trains: predicted beside expert actions, and small rollouts in simulation."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

from defi.config import typed
from defi.engine.loop import Inspect
from Step3_DeFI.policy import DeFI
from Step3_DeFI.samples import PolicySamples

ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


def action_previews(sets: dict[str, PolicySamples], count: int, seed: int) -> Inspect:
    """Pictures of predicted and expert actions, and the error of the policy's chunks, on fixed samples.

    `sets`: by name ("training", "held_out"); `count` samples, evenly spread, are taken of each.
    """
    batches = {name: samples.spread(count, seed) for name, samples in sets.items()}

    def preview(policy: DeFI, step: int, folder: Path) -> dict[str, float]:
        numbers = {}
        for name, batch in batches.items():
            predicted, expert = policy.predict(batch).cpu(), batch["actions"]
            numbers[f"{name}_action_error"] = (predicted - expert).square().mean().item()
            right = (predicted[..., -1] > 0) == (expert[..., -1] > 0)
            numbers[f"{name}_gripper_right"] = right.float().mean().item()
            plot_actions(predicted, expert, batch["text"], folder / f"{name}.png")
        return numbers

    return preview


def plot_actions(predicted: Tensor, expert: Tensor, texts: list[str], file: Path) -> None:
    """One row per sample, six at most, one panel per action dimension: the chunks of expert and policy."""
    rows, columns = len(texts[:6]), predicted.shape[-1]
    figure = Figure(figsize=(14, 1.6 * rows), layout="tight")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for row, dim in np.ndindex(rows, columns):
        axes[row, dim].plot(expert[row, :, dim], color="0.6", label="expert")
        axes[row, dim].plot(predicted[row, :, dim], color="tab:blue", label="policy")
    for row in range(rows):
        axes[row, 0].set_ylabel(texts[row][:24], fontsize=6)
    for axis, name in zip(axes[0], ACTION_NAMES):
        axis.set_title(name, fontsize=9)
    axes[0, 0].set_ylim(-1.3, 1.3)  # of all: they share it
    axes[0, 0].legend(fontsize=6)
    figure.savefig(file, dpi=90)


def rollouts(cfg: DictConfig) -> Inspect:
    """Small rollouts; imports the simulation only where they are asked for."""
    from Step3_DeFI.rollout.evaluate import Evaluation, evaluate_policy
    from Step3_DeFI.rollout.protocol import RolloutConfig

    evaluation = Evaluation.prepare(typed(RolloutConfig, {**cfg.rollout, "sim": cfg.sim}, "rollout"))
    how = {"precision": cfg.trainer.precision}
    return lambda policy, step, folder: evaluate_policy(policy, evaluation, output=folder, **how)
