"""Exact resume of every stage: 4 steps equal 2 steps, stop, 2 steps, in every byte that is saved.

The stop lies inside a pass over the data; gradients are accumulated, weights averaged, and the second half is
read by loader workers.
"""

import json
from pathlib import Path

import pytest
import torch
from stages import STAGES, build_dropping_policy, train_stage

from defi.engine.checkpoint import find_checkpoint


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(stage: str, tmp_path: Path) -> None:
    settings = {"micro_batch": 2, "build": build_dropping_policy if stage == "policy" else None}
    train_stage(stage, tmp_path / "whole", steps=4, **settings)
    train_stage(stage, tmp_path / "parts", steps=2, **settings)
    torch.manual_seed(99)  # whatever happened in between
    train_stage(stage, tmp_path / "parts", steps=4, resume=True, workers=2, **settings)
    whole, parts = (find_checkpoint(tmp_path / name, stage) for name in ("whole", "parts"))
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(parts) for path in parts.rglob("*") if path.is_file()}
    assert sum(file.suffix == ".safetensors" for file in files) >= 3, "weights, averages, optimizer"
    for file in files - {Path("manifest.json"), Path("state/progress.json")}:
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    first, second = (json.loads((c / "state" / "progress.json").read_text()) for c in (whole, parts))
    assert first | {"elapsed_s": 0} == second | {"elapsed_s": 0}
