"""Every stage small, trained on made-up samples; as a script, all of them, for `accelerate launch`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_toy import Points, toy, trainer
from policy_fakes import PRESET, build_gfdm, build_gidm, build_policy
from safetensors.torch import load_file
from torch.utils.data import Dataset

from defi.engine.checkpoint import find_checkpoint
from defi.engine.config import TrainerConfig
from defi.engine.log import METRICS, read_metrics
from defi.engine.loop import train
from defi.engine.model import StageModel
from Step1_GFDM.config import VAESizes
from Step1_GFDM.vae import VAEConfig, VideoVAE

LOSSES = ("loss", "mse", "codebook", "commitment", "action_loss")
TEXTS = ("open the drawer", "push the red block to the left", "turn on the light")


class MadeUp(Dataset):
    """Samples of normal numbers, drawn anew in every pass, in these shapes; `text` beside them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __len__(self) -> int:
        return 11

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(rng.normal(size=s)).float() for name, s in self.shapes.items()}
        return tensors | {"text": TEXTS[index % len(TEXTS)]}


def build_vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE.from_config(VAEConfig(image_size=16, sizes=VAESizes([32, 32], 1)))


def build_dropping_policy() -> StageModel:
    return build_policy(action_head=PRESET["policy"]["action_head"] | {"residual_dropout": 0.2})


def build_lora_policy() -> StageModel:
    return build_policy(finetune={"mode": "lora", "rank": 2})


STAGES: dict[str, tuple[Callable[[], StageModel], dict[str, tuple[int, ...]]]] = {
    "vae": (build_vae, {"frames": (2, 3, 16, 16)}),
    # 2 x 2 at the lowest level: normalised alone, a single pixel would only have the gradient of rounding.
    "gfdm": (lambda: build_gfdm(image_size=32), {"latents": (3, 4, 16, 16)}),
    "gidm": (lambda: build_gidm(restart_pairs=6), {"frames": (2, 3, 28, 28)}),
    "policy": (build_policy, {"latents": (2, 4, 8, 8), "actions": (10, 7)}),
}


def train_stage(
    stage: str,
    output: Path,
    *,
    steps: int,
    build: Callable[[], StageModel] | None = None,
    resume: bool = False,
    **changes: Any,
) -> None:
    """A few steps of a stage with averages, at a global batch of 4."""
    standard, shapes = STAGES[stage]
    settings = {
        "global_batch": 4,
        "max_steps": steps,
        "lr": 1e-3,
        "ema": 0.9,
        "save_every": 0,
        "log_every": 1,
    }
    numbers = TrainerConfig(**(settings | changes))
    model = (build or standard)()
    train(model, MadeUp(shapes), numbers, output=output, config={"preset_name": "test"}, resume=resume)


def assert_same_training(one: Path, other: Path) -> None:
    """The same losses, gradients, weights, averages and buffers, within float error, at the end of two runs.

    Adam divides a gradient by its size, and so makes the float error of a small one large: the gradients (as
    mean over the steps) are held to 1e-3 of the model's largest, weights to a sixth of what they can move.
    """
    first, second = find_checkpoint(one), find_checkpoint(other)
    files = [path.relative_to(first) for path in first.rglob("*.safetensors") if "state" not in path.parts]
    assert len(files) >= 2
    optimizer, other_optimizer = (load_file(c / "state" / "optimizer.safetensors") for c in (first, second))
    means = {key: mean for key, mean in optimizer.items() if key.startswith("exp_avg.")}
    largest = max(mean.abs().max().item() for mean in means.values())
    for key, mean in means.items():
        torch.testing.assert_close(other_optimizer[key], mean, rtol=0, atol=1e-3 * largest)
    for file in files:
        found = load_file(second / file)
        for name, tensor in load_file(first / file).items():
            moved = _moved(optimizer, name, tensor)
            torch.testing.assert_close(
                found[name][moved],
                tensor[moved],
                rtol=1e-3,
                atol=5e-4,
                msg=lambda m: f"{file}: {name}: {m}",  # noqa: B023
            )
    for a, b in zip(read_metrics(one / METRICS), read_metrics(other / METRICS), strict=True):
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        for name in LOSSES:
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4), name


def _moved(optimizer: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Where a tensor has a gradient; all of a buffer.

    A bias before a normalisation has none but rounding, which Adam makes as large as any other.
    """
    for key, squares in optimizer.items():
        if key.startswith("exp_avg_sq.") and key.endswith(f".{name}"):
            return squares.sqrt() > 1e-6
    return torch.ones_like(tensor, dtype=torch.bool)


if __name__ == "__main__":
    for name in STAGES:
        train_stage(name, Path(sys.argv[1]) / name, steps=3)
    train(
        toy(dropout=0.0), Points(), trainer(max_steps=3), output=Path(sys.argv[1]) / "toy",
        config={"preset_name": "test"},
    )  # fmt: skip
