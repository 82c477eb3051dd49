"""The tri-stage schedule against recorded learning rates."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from defi.engine.config import TrainerConfig
from defi.engine.optimizer import learning_rate


def test_tri_stage_equals_the_recorded_rates(reference: Path) -> None:
    with safe_open(reference / "models" / "tri_stage_lr.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        recorded = file.get_tensor("out.lr")
    trainer = TrainerConfig(
        schedule="tri_stage",
        lr=config["lr"],
        max_steps=config["total_steps"],
        phases=config["phase_ratio"],
        start_scale=config["init_lr_scale"],
        end_scale=config["final_lr_scale"],
    )
    rates = [learning_rate(step, trainer) for step in range(len(recorded))]
    torch.testing.assert_close(torch.tensor(rates, dtype=recorded.dtype), recorded, rtol=1e-12, atol=0)
