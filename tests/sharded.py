"""Sharded runs of all stages, for `accelerate launch --use_fsdp`."""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from engine_toy import Points, toy, trainer
from stages import STAGES, build_lora_policy, train_stage
from torch.distributed.tensor import DTensor

from defi.engine.loop import train
from defi.engine.model import StageModel
from defi.errors import UserError

CONFIG = {"config": {"preset_name": "test"}}
BATCH = {"x": torch.ones(2, 3), "seed": torch.arange(2)}


def look(model: StageModel, step: int, folder: Path) -> dict[str, float]:
    """In the main process alone, which holds all of the model here."""
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {"held_out_loss": float(model(BATCH)["loss"])}


class OneBad(Points):
    """Sample 7 is not a number: in one of the processes."""

    def sample(self, index: int, rng) -> dict:
        sample = super().sample(index, rng)
        return {**sample, "x": sample["x"] * float("nan")} if index == 7 else sample


def main(folder: Path) -> None:
    for stage in STAGES:
        train_stage(stage, folder / "whole" / stage, steps=3, micro_batch=1)
        train_stage(stage, folder / "parts" / stage, steps=2, micro_batch=1)
        torch.manual_seed(99)  # whatever happened in between
        train_stage(stage, folder / "parts" / stage, steps=3, micro_batch=1, resume=True)

    train_stage("policy", folder / "lora", steps=2, micro_batch=1, build=build_lora_policy)
    settings = trainer(max_steps=3, preview_every=3)
    train(toy(dropout=0.0), Points(), settings, output=folder / "whole" / "toy", preview=look, **CONFIG)
    # What one process began (the test did), two go on with.
    train(toy(dropout=0.0), Points(), trainer(max_steps=6), output=folder / "begun", resume=True, **CONFIG)
    leave_out = trainer(max_steps=6, skip_nonfinite=1)
    train(toy(dropout=0.0), OneBad(), leave_out, output=folder / "left_out", **CONFIG)
    try:
        train(toy(dropout=0.0), OneBad(), trainer(max_steps=6), output=folder / "stopped", **CONFIG)
    except UserError as error:
        print(f"stopped: {error}")
    AcceleratorState._reset_state()  # it remembers the precision
    for stage in ("gidm", "policy"):
        train_stage(stage, folder / "bf16" / stage, steps=3, precision="bf16")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
