"""Preparation of stages 1 and 3 on made-up data; as a script, both, for `accelerate launch`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from policy_fakes import PRESET, write_demonstrations, write_stages

from defi.config import CONFIG_DIR
from defi.processes import processes
from defi.video import frame_count, read_frames, write_mp4
from Step1_GFDM import prepare as step1
from Step1_GFDM.config import VAESizes
from Step1_GFDM.pipeline import build_vae
from Step3_DeFI import prepare as step3

KINDS = ("latents", "store")
VIDEOS = 22  # besides a damaged one
LENGTHS = (40, 40)  # of the demonstrations
OBSERVATIONS = sum(LENGTHS) - 2 * 9


def write_inputs(folder: Path) -> Path:
    """Captioned videos, one of them damaged; demonstrations; the networks that both are encoded with."""
    lines = []
    for number in range(VIDEOS):
        frames = np.random.default_rng(number).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
        write_mp4(folder / "videos" / f"{number:02d}.mp4", frames, 10)
        lines.append({"video": f"{number:02d}.mp4", "text": f"do thing {number}"})
    (folder / "videos" / "damaged.mp4").write_bytes(b"no video")
    lines.insert(7, {"video": "damaged.mp4", "text": "do nothing"})
    (folder / "videos" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    build_vae(VAESizes([32, 32], 1), 16).save_pretrained(folder / "vae")
    write_demonstrations(folder / "demos", lengths=LENGTHS)
    write_stages(folder)
    return folder


def run(kind: str, inputs: Path, output: Path, *, resume: bool = False, **values: Any) -> None:
    """One of the two, as a user starts it; stage 3's observations are encoded one by one."""
    given: dict[str, Any] = {"output": output, "resume": resume}
    if kind == "latents":
        given |= {"data": "videos", "data.root": inputs / "videos", "data.captions": "captions.jsonl"}
        given |= {"vae": inputs / "vae"} | values
        GlobalHydra.instance().clear()
        sys.argv = ["prepare", *(f"{key}={value}" for key, value in given.items())]
        step1.main()
        return
    given |= {"data.root": inputs / "demos", "data.min_remaining": 9, "gfdm_checkpoint": inputs / "gfdm"}
    step3.prepare(settings(**given | {"store.kind": "latents", "store.batch": 1} | values))


def settings(**values: Any) -> DictConfig:
    """Of stage 3's preparation, at the tests' sizes."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("step3_prepare", [f"{key}={value}" for key, value in values.items()])
    cfg = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)), PRESET)
    OmegaConf.resolve(cfg)
    return cfg


def contents(folder: Path) -> dict[str, bytes | tuple[int, ...]]:
    """Of all files in it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    # An encoder that shares its processors may choose other bytes for the same film.
    return {
        str(p.relative_to(folder)): read_frames(p, range(frame_count(p))).shape
        if p.suffix == ".mp4"
        else p.read_bytes()
        for p in files
    }


def noted(done: list[str]) -> None:
    """From now on `done` gets the name of each episode, and the first row of each batch, that is encoded."""
    write, encode = step1.write_episode, step3.Encoder.__call__

    def write_episode(output: Path, name: str, job: step1.Recording, *args: Any) -> None:
        done.append(f"{job.split}/{name}")
        write(output, name, job, *args)

    def encoded(self: step3.Encoder, images: np.ndarray, texts: list[str], rows: np.ndarray) -> np.ndarray:
        done.append(str(rows[0]))
        return encode(self, images, texts, rows)

    step1.write_episode, step3.Encoder.__call__ = write_episode, encoded


def dawdle(seconds: float) -> None:
    """From now on this process is late after every wait for the others."""
    wait = PartialState.wait_for_everyone

    def wait_for_everyone(self: PartialState) -> None:
        wait(self)
        time.sleep(seconds)

    PartialState.wait_for_everyone = wait_for_everyone


if __name__ == "__main__":
    inputs, output = map(Path, sys.argv[1:])
    done: list[str] = []
    noted(done)
    if processes().process_index == 1:
        dawdle(0.5)  # meanwhile the first one finishes some, which must not shift the shares
    for kind in KINDS:
        run(kind, inputs, output / kind)
    (output / f"done_{processes().process_index}.json").write_text(json.dumps(done))
