"""Published video models (diffusers folders) → GFDM.

Stable Video Diffusion, and models finetuned from it: VPP's and DeFI's, whose UNet attends to CLIP's text
tokens. Some folders hold that text tower (`text_encoder/`, `tokenizer/`); for the others it is the preset's.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from defi.checkpoints.account import Report, Shapes, account, shapes
from defi.errors import UserError
from defi.text import CLIPText
from Step1_GFDM import pipeline
from Step1_GFDM.build import build_unet, build_vae
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM

TITLE = "published video model (diffusers folder)"
PARTS = ("unet", "vae")
SPARE = {
    "image_encoder": "CLIP's image tower, whose place text takes",
    "feature_extractor": "the image tower's input settings",
    "safety_checker": "not used",
}


def recognises(names: Iterable[str]) -> bool:
    """Whether tensors of these names, as `read` gives them, are a video model."""
    return "unet.conv_in.weight" in names


def build(cfg: DictConfig) -> GFDM:
    """The model of a preset, new."""
    return GFDM.from_config(GFDMConfig.from_preset(cfg))


def publish(model: GFDM) -> dict[str, Tensor]:
    """The trained part; diffusers' names are ours."""
    return model.own_state()


def read(folder: Path) -> dict[str, Tensor]:
    """UNet and VAE of a diffusers folder, names beginning with their part."""
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: has no {missing[0]}/; give the folder of a Stable Video Diffusion model")
    return {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in pipeline.read_weights(folder / part).items()
    }


def expected(config: GFDMConfig, text_width: int) -> Shapes:
    """What `read` must give for a preset."""
    with torch.device("meta"):
        parts = (build_unet(config, text_width), build_vae(config.vae, config.image_size))
    return {
        f"{part}.{name}": shape
        for part, network in zip(PARTS, parts)
        for name, shape in shapes(network.state_dict()).items()
    }


def convert(cfg: DictConfig) -> tuple[GFDM, Report]:
    """The GFDM in the diffusers folder `cfg.source`, at the sizes of a preset, its text tower included."""
    folder, config = Path(cfg.source), GFDMConfig.from_preset(cfg)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a Stable Video Diffusion model")
    clip = _text_tower(folder, config)
    report = account(read(folder), expected(config, clip.width), source=folder).demand()
    report.spare = {why: [f"{part}/"] for part, why in SPARE.items() if (folder / part).exists()}
    parts, sizes = pipeline.load_foreign(folder, clip)
    config = replace(config, **sizes, pretrained=None, clip=replace(config.clip, pretrained=None))
    return GFDM(config, **parts, clip=clip), report


def _text_tower(folder: Path, config: GFDMConfig) -> CLIPText:
    if (folder / "text_encoder").is_dir():
        return CLIPText.load(folder / "text_encoder", config.clip, tokenizer=folder / "tokenizer")
    return CLIPText.from_config(config.clip)
