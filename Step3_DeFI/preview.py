"""Previews while the policy trains: predicted beside expert actions, and small rollouts in simulation."""

from pathlib import Path

import matplotlib
from omegaconf import DictConfig
from torch import Tensor

from defi.config import typed
from defi.engine.loop import Inspect
from Step3_DeFI.policy import DeFI
from Step3_DeFI.samples import PolicySamples

matplotlib.use("Agg")

import matplotlib.pyplot as plt

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


def plot_actions(predicted: Tensor, expert: Tensor, texts: list[str], file: Path, *, rows: int = 6) -> None:
    """One row per sample, one panel per action dimension: the expert's chunk and the policy's."""
    rows = min(rows, len(texts))
    size = (14, 1.6 * rows)
    figure, axes = plt.subplots(
        rows, predicted.shape[-1], figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for row, text in enumerate(texts[:rows]):
        for dim, axis in enumerate(axes[row]):
            axis.plot(expert[row, :, dim], color="0.6", label="expert")
            axis.plot(predicted[row, :, dim], color="tab:blue", label="policy")
        axes[row][0].set_ylabel(text[:24], fontsize=6)
    for axis, name in zip(axes[0], ACTION_NAMES):
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-1.3, 1.3)  # of all: they share it
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def rollouts(cfg: DictConfig) -> Inspect:
    """Small rollouts; imports the simulation only where they are asked for."""
    from Step3_DeFI.rollout.evaluate import Evaluation, evaluate_policy
    from Step3_DeFI.rollout.protocol import RolloutConfig

    evaluation = Evaluation.prepare(typed(RolloutConfig, {**cfg.rollout, "sim": cfg.sim}, "rollout"))
    precision = cfg.trainer.precision
    return lambda policy, step, folder: evaluate_policy(
        policy, evaluation, precision=precision, output=folder
    )
