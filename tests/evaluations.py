"""The commands that look at what was trained, on made-up data; as a script, all, for `accelerate launch`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preparations
from hydra.core.global_hydra import GlobalHydra

from benchmarks.rlds_writer import write_videos
from defi.engine.checkpoint import find_weights
from Step1_GFDM.eval import main as imagine
from Step2_GIDM.label import main as label
from Step3_DeFI.rollout.evaluate import main as roll_out

CHAINS, EPISODES = 4, 4
SCRIPT = "<script>alert(1)</script>"


def write_inputs(folder: Path) -> Path:
    """Models of stages 1 and 2, latents for the first, episodes for the second."""
    preparations.write_inputs(folder)
    preparations.run("latents", folder, folder / "latents", vae=find_weights(folder / "gfdm") / "vae")
    write_videos(folder, {"train": [[4, 2, 5], [3, 3]], "val": [[2]]}, size=16)
    return folder


def settings_of(kind: str, inputs: Path, output: Path) -> dict[str, Any]:
    if kind == "rollout":
        tasks = "[open_drawer,close_drawer,turn_on_led,turn_off_led]"
        return {"agent": "random", "tasks": tasks, "length": 2, "chains": CHAINS, "max_steps": "[8,16]",
                "processes": 1, "videos.chains": 1, "baseline": None, "output": output}  # fmt: skip
    if kind == "labels":
        return {"checkpoint": inputs / "gidm", "data": "rlds", "data.root": inputs / "toy",
                "data.index": inputs / "index", "data.split": "train", "data.distance": "[2,2]",
                "output": output / "codes.npz"}  # fmt: skip
    return {"checkpoint": inputs / "gfdm", "data.root": inputs / "latents", "split": "train",
            "data.sets.demonstrations.cameras": "[1]", "episodes": EPISODES, "steps": 2,
            "instruction": f"'{SCRIPT}'", "output": output}  # fmt: skip


COMMANDS: dict[str, Callable[[], None]] = {"rollout": roll_out, "labels": label, "imagined": imagine}


def run(kind: str, inputs: Path, output: Path) -> None:
    """One start of a command, as a cluster would repeat it."""
    settings = settings_of(kind, inputs, output)
    if output.exists():
        settings["resume" if kind == "rollout" else "overwrite"] = True
    GlobalHydra.instance().clear()
    given = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    sys.argv = [kind, *given]
    COMMANDS[kind]()


def outcome(kind: str, output: Path) -> Any:
    """All that a command says, without times."""
    if kind == "rollout":
        results = json.loads((output / "results.json").read_text())
        chains = [chain | {"seconds": 0} for chain in results["chains"]]
        clips = sorted(path.name for path in (output / "videos").rglob("*.mp4"))
        return chains, results["limits"], results["protocol"], results["run"]["control_steps"], clips
    files = {name: content for name, content in preparations.contents(output).items() if name[0] != "."}
    # Encoders round the same pictures differently, now and then, so films are not compared byte by byte.
    return {name: b"" if name.endswith((".mp4", ".html")) else content for name, content in files.items()}


if __name__ == "__main__":
    inputs, output = map(Path, sys.argv[1:])
    for kind in COMMANDS:
        run(kind, inputs, output / kind)
