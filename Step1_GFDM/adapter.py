"""Published video models (diffusers folders) → GFDM.

Stable Video Diffusion, and models finetuned from it: VPP's and DeFI's, whose UNet attends to CLIP's text
tokens. Some folders hold that text tower (`text_encoder/`, `tokenizer/`); for the others it is the preset's.
"""

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from defi.checkpoints.files import read_foreign
from defi.checkpoints.matching import LoadingReport, compare, under
from defi.errors import UserError
from defi.text import CLIPText
from Step1_GFDM import pipeline
from Step1_GFDM.config import GFDMConfig
from Step1_GFDM.model import GFDM

TITLE = "published video model (diffusers folder)"
MARK = "unet.conv_in.weight"
UNNEEDED = {
    "image_encoder": "CLIP's image tower, whose place text takes",
    "feature_extractor": "the image tower's input settings",
    "safety_checker": "not used",
}


def build(cfg: DictConfig) -> GFDM:
    """The model of a preset, new."""
    return GFDM.from_config(GFDMConfig.from_preset(cfg))


def publish(model: GFDM) -> dict[str, Tensor]:
    """The trained part; diffusers' names are ours."""
    return model.own_state()


def read(folder: Path) -> dict[str, Tensor]:
    """UNet and VAE of a diffusers folder, names beginning with their part."""
    tensors: dict[str, Tensor] = {}
    for part in ("unet", "vae"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder}: has no {part}/; give the folder of a Stable Video Diffusion model")
        tensors |= under(f"{part}.", read_foreign(pipeline.weights_file(folder / part)))
    return tensors


def expected(config: GFDMConfig, text_width: int) -> dict[str, Tensor]:
    """What `read` must give for a preset, on the meta device."""
    with torch.device("meta"):
        unet = pipeline.build_unet(config, text_width)
        vae = pipeline.build_vae(config.vae, config.image_size)
    return under("unet.", unet.state_dict()) | under("vae.", vae.state_dict())


def convert(cfg: DictConfig) -> tuple[GFDM, LoadingReport]:
    """The GFDM in the diffusers folder `cfg.source`, at the sizes of a preset, its text tower included."""
    folder, config = Path(cfg.source), GFDMConfig.from_preset(cfg)
    tensors = read(folder)
    if (folder / "text_encoder").is_dir():
        clip = CLIPText.load(folder / "text_encoder", config.clip, tokenizer=folder / "tokenizer")
    else:
        clip = CLIPText.from_config(config.clip)
    report = compare(tensors, expected(config, clip.width), source=folder).check()
    report.left_over = {why: [f"{part}/"] for part, why in UNNEEDED.items() if (folder / part).exists()}
    parts, sizes = pipeline.load_foreign(folder, clip.width)
    config = replace(config, **sizes, pretrained=None, clip=replace(config.clip, pretrained=None))
    return GFDM(config, **parts, clip=clip), report
