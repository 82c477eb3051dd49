"""An exported folder as a run of starVLA's, which integrations/starvla/defi_framework.py loads there.

config.yaml                     starVLA's: the framework's name, where the policy lies, the size of a chunk
dataset_statistics.json         how starVLA makes the robot's units of what the networks see
checkpoints/model.safetensors   the policy's trained weights: defi/model.safetensors once more
README.md                       the card
defi/                           the exported folder, which `Policy.load` takes
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from defi.checkpoints.export_lerobot import share_files
from defi.engine.checkpoint import NESTED, RUN_CONFIG
from defi.engine.model import WEIGHTS
from defi.engine.output import LEFTOVER
from defi.robot.spec import Vector

RUNS = "results/Checkpoints"  # where starVLA keeps its runs, below its own folder
SECTION = """
## In starVLA

With `integrations/starvla/defi_framework.py` of DeFI's repository this folder is a run of starVLA.
Its server: `--ckpt_path <folder>/checkpoints/model.safetensors --config_override framework.policy=<folder>`.
"""


def write(policy: Any, folder: Path, run: Mapping[str, Any]) -> None:
    """Beside the exported policy, a `DeFI`, what starVLA wants of a run."""
    name = folder.name.removeprefix(".").removesuffix(LEFTOVER)  # that it will have
    config = policy.config
    executed = config.robot.executed or config.chunk  # so many of a chunk its clients carry out
    sizes = {"action_dim": config.action_dim, "action_horizon": executed, "state_dim": config.state_dim}
    settings = {
        "run_id": name,
        "run_root_dir": RUNS,
        "framework": {
            "name": "DeFI",
            "policy": f"{RUNS}/{name}",
            "precision": None,  # no, fp16 or bf16; null: that of its training
            "action_model": sizes,
        },
        "datasets": {"vla_data": {"data_mix": name}},
        "trainer": {},
    }
    (folder / RUN_CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    state = config.robot.state if config.state else Vector.plain([])
    found = {"action": statistics(config.robot.actions), "state": statistics(state)}
    (folder / "dataset_statistics.json").write_text(json.dumps({name: found}, indent=1))
    (folder / "checkpoints").mkdir()
    share_files(folder / NESTED / WEIGHTS, folder / "checkpoints" / WEIGHTS)
    with (folder / "README.md").open("a") as card:
        card.write(SECTION)


def statistics(vector: Vector) -> dict[str, list[float] | list[bool]]:
    """Numbers with which each of starVLA's rules, mean_std, q99 and min_max, gives value · scale + offset.

    So only the first two are what their names say, and only where the policy normalises by mean and std.
    """
    offset, scale = np.array(vector.offset), np.array(vector.scale)
    low, high = (offset - scale).tolist(), (offset + scale).tolist()
    ends = {"min": low, "max": high, "q01": low, "q99": high, "mask": [True] * len(vector)}
    return {"mean": vector.offset, "std": vector.scale} | ends
