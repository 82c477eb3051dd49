"""An exported folder as one of LeRobot's, which its plug-in (integrations/lerobot_policy_defi) loads there.

config.json, policy_{pre,post}processor.json   LeRobot's own
model.safetensors                              the policy's trained weights: defi/model.safetensors once more
README.md                                      the card
defi/                                          the exported folder, which the plug-in and `Policy.load` take
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from defi.config import flatten
from defi.engine.checkpoint import NESTED
from defi.engine.model import CONFIG, WEIGHTS

CARD = "README.md"
DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
SECTION = """
## In LeRobot

With the plug-in `integrations/lerobot_policy_defi` of DeFI's repository it is a policy of LeRobot 0.6, too:
`lerobot-eval --policy.path=…`, `lerobot-rollout --policy.path=…`, `lerobot-train --policy.path=…`.
"""


def write(policy: Any, folder: Path, run: Mapping[str, Any]) -> None:
    """Beside the exported `DeFI` what LeRobot wants. `run`: the settings that it was trained with."""
    share_files(folder / NESTED / WEIGHTS, folder / WEIGHTS)
    config, size = policy.config, policy.image_size
    robot = config.robot
    inputs = {f"observation.images.{name}": _feature("VISUAL", 3, size, size) for name in robot.cameras}
    if config.state:
        inputs["observation.state"] = _feature("STATE", config.state_dim)
    outputs = {"action": _feature("ACTION", config.action_dim)}
    identity = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")
    flat = flatten(run)
    values = {
        "type": "defi",
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": identity,
        "preset": flat.get("preset_name") or "tiny",
        "chunk": config.chunk,
        "dtype": DTYPES.get(flat.get("trainer.precision", "no"), "float32"),
        "action_feature_names": robot.actions.names,
    }
    # As the plug-in's processors are saved: LeRobot's usual steps, which change no number.
    normal = {"eps": 1e-8, "norm_map": identity}
    before = {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        "device_processor": {"device": "cpu", "float_dtype": None},
        "normalizer_processor": {**normal, "features": inputs | outputs},
    }
    after = {
        "unnormalizer_processor": {**normal, "features": outputs},
        "device_processor": {"device": "cpu", "float_dtype": None},
    }
    _write(folder / CONFIG, values)
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        listed = [{"registry_name": step, "config": settings} for step, settings in steps.items()]
        _write(folder / f"{name}.json", {"name": name, "steps": listed})
    with (folder / CARD).open("a") as card:
        card.write(SECTION)


def share_files(source: Path, target: Path) -> None:
    """A file or folder once more, without taking its space again where hard links go."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    if os.path.exists(target) and os.path.samefile(source, target):  # a checkpoint saved in its own place
        return
    Path(target).unlink(missing_ok=True)
    with suppress(OSError):  # another disk, or one without links
        os.link(os.path.realpath(source), target)  # the hub's caches hold symbolic links
        return
    shutil.copy2(source, target)


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=4))
