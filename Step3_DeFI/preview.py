"""Previews while the policy trains: predicted beside expert actions, and small rollouts in simulation."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from defi.data.mixture import Mixture
from defi.engine.loop import Inspect
from defi.robot.spec import Vector
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.samples import PolicySamples, spread

Samples = PolicySamples | Mixture[PolicySamples]


def action_previews(sets: dict[str, Samples], count: int, seed: int) -> Inspect:
    """Pictures of predicted and expert actions, and the error of the policy's chunks, on fixed samples.

    `sets`: by name ("training", "held_out"); `count` samples, evenly spread, are taken of each.
    """
    batches = {name: spread(samples, count, seed) for name, samples in sets.items()}

    def preview(policy: DeFI, step: int, folder: Path) -> dict[str, float]:
        numbers, robot = {}, policy.config.robot
        for name, batch in batches.items():
            predicted, expert = policy.predict(batch).cpu(), batch["actions"]
            apart = robot.actions.normalise(predicted) - robot.actions.normalise(expert)
            numbers[f"{name}_action_error"] = apart.square().mean().item()
            if robot.gripper is not None:
                commands = (each[..., robot.gripper.dimension] for each in (predicted, expert))
                opens, should = (command > robot.gripper.threshold for command in commands)
                numbers[f"{name}_gripper_right"] = (opens == should).float().mean().item()
            plot_actions(predicted, expert, batch["text"], robot.actions, folder / f"{name}.png")
        return numbers

    return preview


def plot_actions(
    predicted: Float[Tensor, "B K A"],
    expert: Float[Tensor, "B K A"],
    texts: list[str],
    actions: Vector,
    file: Path,
) -> None:
    """One row per sample, six at most, one panel per dimension: the chunks of expert and policy, in the
    robot's units, over the range of the training data."""
    rows, columns = len(texts[:6]), len(actions)
    figure = Figure(figsize=(2 * columns, 1.6 * rows), layout="tight")
    axes = figure.subplots(rows, columns, sharex=True, sharey="col", squeeze=False)
    for row, dim in np.ndindex(rows, columns):
        axes[row, dim].plot(expert[row, :, dim], color="0.6", label="expert")
        axes[row, dim].plot(predicted[row, :, dim], color="tab:blue", label="policy")
    for row in range(rows):
        axes[row, 0].set_ylabel(texts[row][:24], fontsize=6)
    for axis, name, low, high in zip(axes[0], actions.names, actions.low, actions.high):
        axis.set_title(name, fontsize=9)
        if low < high:
            axis.set_ylim(
                low - (high - low) * 0.15, high + (high - low) * 0.15
            )  # of the column: they share it
    axes[0, 0].legend(fontsize=6)
    figure.savefig(file, dpi=90)


def rollouts(cfg: DictConfig, policy: PolicyConfig) -> Inspect:
    """Small rollouts; imports the simulation only where they are asked for.

    Raises:
        UserError: the policy's robot is not the simulators', or a setting does not fit.
    """
    from Step3_DeFI.rollout.config import RolloutConfig, check_robot, read_settings, settle_adapters
    from Step3_DeFI.rollout.evaluate import Evaluation, evaluate_policy

    beside = {"sim": cfg.sim} if "sim" in cfg else {}  # of the play table, where its group puts it
    benchmark, config = read_settings(RolloutConfig, OmegaConf.create({**cfg.rollout, **beside}), "rollout")
    adapters = settle_adapters(config, policy.robot, benchmark.robot)
    check_robot(policy, benchmark.robot, "trainer.rollout_every", adapters)
    evaluation = Evaluation.prepare(benchmark, config)
    how = {"precision": cfg.trainer.precision}
    return lambda policy, step, folder: evaluate_policy(policy, evaluation, output=folder, **how)
