"""A policy and the stages below it, small enough to be built in every test."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from defi.config import typed
from defi.data import calvin
from defi.engine import checkpoint
from defi.text import TextConfig
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM
from Step2_GIDM.dino import DinoConfig
from Step2_GIDM.model import GIDM, GIDMConfig
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.samples import RecordedSamples, SampleSettings
from Step3_DeFI.stages import language_of

TEXT = {"tokens": 12, "width": 16, "layers": 1, "heads": 2, "projection": 16}

PRESET: dict[str, Any] = {
    "text": {"clip": TEXT | {"seed": 1}, "t5": TEXT | {"seed": 2}},
    "gfdm": {
        "frames": 3,
        "frame_step": 2,
        "image_size": 16,
        "unet": {
            "block_out_channels": [32, 32, 32, 32],
            "num_attention_heads": [1, 1, 1, 1],
            "layers_per_block": 1,
            "addition_time_embed_dim": 8,
        },
        "vae": {"block_out_channels": [32, 32], "layers_per_block": 1},
    },
    "policy": {
        "latent_action_frames": [0, 2],
        "standardise": True,
        "merge": 2,
        "video_former": {
            "dim": 24,
            "depth": 1,
            "heads": 2,
            "head_dim": 12,
            "queries": 2,
        },
        "action_head": {
            "dim": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "heads": 2,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "mlp_dropout": 0.0,
            "identity_modulation": True,
        },
        "diffusion": {"draws": 2},
    },
}


def policy_config(**changes: Any) -> PolicyConfig:
    """Of CALVIN's robot, if `changes` name no other."""
    return typed(PolicyConfig, PRESET["policy"] | {"robot": calvin.calvin_robot()} | changes, "policy")


def recorded(
    root: Path,
    min_remaining: int = 9,
    *,
    stride: int = 1,
    chunk: int = 10,
    spans: str | None = None,
    **given: Any,
) -> RecordedSamples:
    """Samples of CALVIN's format, at the tests' sizes."""
    data = calvin.Settings(root=str(root), spans=spans).open("training")
    own = SampleSettings(min_remaining=min_remaining, stride=stride)
    return RecordedSamples(data, own, chunk=chunk, image_size=16, **given)


def build_gfdm(seed: int = 0, **changes: Any) -> GFDM:
    torch.manual_seed(seed)
    return GFDM.from_config(
        typed(GFDMConfig, {**PRESET["gfdm"], "clip": PRESET["text"]["clip"], **changes}, "")
    )


def build_gidm(seed: int = 0, **changes: Any) -> GIDM:
    torch.manual_seed(seed)
    sizes = {"width": 16, "encoder_blocks": 1, "decoder_blocks": 1, "heads": 2, "codes": 8, "code_width": 8}
    dino = DinoConfig(image_size=28, width=16, layers=1, heads=2)
    return GIDM(GIDMConfig(**(sizes | changes), dino=dino, text=TextConfig(**PRESET["text"]["t5"])))


def build_policy(**changes: Any) -> DeFI:
    gfdm, gidm = build_gfdm(), build_gidm()
    torch.manual_seed(0)
    return DeFI(policy_config(**changes), gfdm=gfdm, **language_of(gidm))


def write_stages(folder: Path) -> tuple[Path, Path]:
    """Run folders of a stage-1 and a stage-2 model."""
    for name, model in (("gfdm", build_gfdm()), ("gidm", build_gidm())):
        checkpoint.save(model, folder / name, step=1, config={"preset_name": "test"})
    return folder / "gfdm", folder / "gidm"


def write_demonstrations(folder: Path, *, lengths: tuple[int, ...] = (15, 22), seed: int = 0) -> Path:
    """A CALVIN-format data set of random pictures; action k of frame i is (i + k / 10) / 1000, gripper 1."""
    rng = np.random.default_rng(seed)
    split = folder / "training"
    spans, episodes, first = [], [], 100
    for number, length in enumerate(lengths):
        for frame in range(first, first + length):
            path = split / calvin.frame_name(frame)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                calvin.encode_frame(
                    {
                        "rgb_static": rng.integers(0, 256, (20, 20, 3)),
                        "rgb_gripper": rng.integers(0, 256, (12, 12, 3)),
                        "rel_actions": np.append((frame + np.arange(6) / 10) / 1000, 1),
                        "actions": np.zeros(7),
                        "robot_obs": np.zeros(15),
                        "scene_obs": np.zeros(24),
                    }
                )
            )
        episodes.append((first, first + length - 1))
        spans.append(calvin.Span(first, first + length - 1, f"do thing {number}", f"task_{number}"))
        first += length
    for name, content in calvin.index_files(episodes, spans, {"A": (100, first - 1)}).items():
        (split / name).parent.mkdir(parents=True, exist_ok=True)
        (split / name).write_bytes(content)
    return folder
