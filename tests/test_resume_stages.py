"""Exact resume of every stage: 4 steps equal 2 steps, stop, 2 steps, in every byte that is saved.

The stop lies inside a pass over the data; gradients are accumulated, weights averaged, and the second half is
read by loader workers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy_fakes import PRESET, build_gfdm, build_gidm, build_policy
from torch.utils.data import Dataset

from defi.engine.checkpoint import find_checkpoint
from defi.engine.config import TrainerConfig
from defi.engine.loop import train
from defi.engine.model import StageModel
from Step1_GFDM.config import VAESizes
from Step1_GFDM.vae import VAEConfig, VideoVAE

TEXTS = ("open the drawer", "push the red block to the left", "turn on the light")
DROPOUT = {"action_head": PRESET["policy"]["action_head"] | {"residual_dropout": 0.2}}


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


STAGES: dict[str, tuple[Callable[[], StageModel], dict[str, tuple[int, ...]]]] = {
    "vae": (build_vae, {"frames": (2, 3, 16, 16)}),
    "gfdm": (build_gfdm, {"latents": (3, 4, 8, 8)}),
    "gidm": (lambda: build_gidm(restart_pairs=6), {"frames": (2, 3, 28, 28)}),
    "policy": (lambda: build_policy(**DROPOUT), {"latents": (2, 4, 8, 8), "actions": (10, 7)}),
}


def train_stage(stage: str, output: Path, *, steps: int, **changes: Any) -> None:
    build, shapes = STAGES[stage]
    resume = changes.pop("resume", False)
    trainer = TrainerConfig(
        global_batch=4, micro_batch=2, max_steps=steps, lr=1e-3, ema=0.9, save_every=0, log_every=1, **changes
    )
    train(build(), MadeUp(shapes), trainer, output=output, config={"preset_name": "test"}, resume=resume)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(stage: str, tmp_path: Path) -> None:
    train_stage(stage, tmp_path / "whole", steps=4)
    train_stage(stage, tmp_path / "parts", steps=2)
    torch.manual_seed(99)  # whatever happened in between
    train_stage(stage, tmp_path / "parts", steps=4, resume=True, workers=2)
    whole, parts = (find_checkpoint(tmp_path / name, stage) for name in ("whole", "parts"))
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(parts) for path in parts.rglob("*") if path.is_file()}
    assert sum(file.suffix == ".safetensors" for file in files) >= 3, "weights, averages, optimizer"
    for file in files - {Path("manifest.json"), Path("state/progress.json")}:
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    first, second = (json.loads((c / "state" / "progress.json").read_text()) for c in (whole, parts))
    assert first | {"elapsed_s": 0} == second | {"elapsed_s": 0}
