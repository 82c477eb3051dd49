"""GFDM on disk: a diffusers folder that `StableVideoDiffusionPipeline.from_pretrained` opens.

model_index.json unet/ vae/ scheduler/     Stable Video Diffusion's parts under its names
image_encoder/ feature_extractor/          the pipeline class insists on them; text takes their place here
text/                                      the CLIP text tower, unless the configuration names its source
gfdm.json                                  GFDMConfig: frames, image size, fps, ... for the next stage
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    ConfigMixin,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from defi.checkpoints.files import find_index, read_foreign
from defi.config import typed
from defi.engine.rng import preserved_rng
from defi.engine.weights import COPY_AGAIN, check_fit, load_strict
from defi.errors import UserError, reading
from defi.files import check_sizes, read_json
from defi.text import CLIPText
from Step1_GFDM.build import sizes_of
from Step1_GFDM.config import GFDMConfig

CONFIG = "gfdm.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED_WEIGHTS = (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
Part = TypeVar("Part", bound=ConfigMixin)

diffusers_logging.disable_progress_bar()


def save(folder: Path, config: GFDMConfig, clip: CLIPText, **parts: Any) -> None:
    """Write the model, frozen parts included, so that the folder stands on its own.

    parts: unet, vae, scheduler.
    """
    # The class opens nothing without an image tower: the smallest of the right width, of zeros, for a thread
    # writes this while the training draws random numbers.
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    width = parts["unet"].config.cross_attention_dim
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, patch_size=112, projection_dim=width))
    tower.to_empty(device="cpu")
    for parameter in tower.parameters():
        nn.init.zeros_(parameter)
    StableVideoDiffusionPipeline(
        image_encoder=tower, feature_extractor=CLIPImageProcessor(), **parts
    ).save_pretrained(folder)
    if config.clip.pretrained is None:
        clip.save(folder / "text")
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=1))


def load(folder: Path) -> tuple[GFDMConfig, dict[str, Any]]:
    """The configuration, and everything else that `GFDM` is made of, from a folder that `save` wrote."""
    file = folder / CONFIG
    values = read_json(file, "give a checkpoint folder of Step1_GFDM.train")
    check_sizes(values, file)
    config = typed(GFDMConfig, values, str(file))
    named = config.clip.pretrained is not None
    clip = CLIPText.from_config(config.clip) if named else CLIPText.load(folder / "text", config.clip)
    return config, {**_load_parts(folder), "clip": clip}


def load_foreign(folder: Path, clip: CLIPText) -> tuple[dict[str, Any], dict[str, Any]]:
    """UNet, VAE and scheduler of any Stable Video Diffusion folder, and the sizes they bring along.

    Raises UserError if a part is missing, or the text tower's width does not fit the UNet.
    """
    if not folder.is_dir():
        raise UserError(f"gfdm.pretrained={folder}: no such folder; give a Stable Video Diffusion folder")
    parts = _load_parts(folder)
    width = parts["unet"].config.cross_attention_dim
    if width != 2 * clip.width:
        raise UserError(
            f"{folder}/unet: attends to width {width}, text.clip gives 2 x {clip.width}; choose the text "
            "tower it was trained with"
        )
    return parts, sizes_of(parts["unet"], parts["vae"])


def _load_parts(folder: Path) -> dict[str, Any]:
    return {
        "unet": load_part(UNetSpatioTemporalConditionModel, folder / "unet"),
        "vae": load_part(AutoencoderKLTemporalDecoder, folder / "vae"),
        "scheduler": _build(EulerDiscreteScheduler, folder / "scheduler"),
    }


def load_part(cls: type[Part], folder: Path) -> Part:
    """A network of a diffusers folder, every tensor accounted for."""
    tensors, source = read_weights(folder), weights_file(folder)
    with preserved_rng(), torch.device("meta"):  # before memory is taken: a damaged file may ask for all
        check_fit(_build(cls, folder).state_dict(), tensors, source=source)
    model = _build(cls, folder)
    load_strict(model.state_dict(), tensors, source=source)
    return model.eval()


def _build(cls: type[Part], folder: Path) -> Part:
    """A part as its configuration describes it."""
    file = folder / cls.config_name
    values = read_json(file, COPY_AGAIN)
    check_sizes(values, file)
    if values.get("_class_name") != cls.__name__:
        raise UserError(f"{folder}: holds a {values.get('_class_name')}, expected {cls.__name__}")
    with reading(file, COPY_AGAIN):
        return cls.from_config(values)


def load_network(model: nn.Module, folder: Path) -> None:
    """Copy a diffusers network's weights into `model`, strictly."""
    load_strict(model.state_dict(), read_weights(folder), source=weights_file(folder))


def weights_file(folder: Path) -> Path:
    """Where a network's tensors lie: as this project writes them, or as a published folder may have them."""
    single = next((folder / name for name in PUBLISHED_WEIGHTS if (folder / name).is_file()), None)
    return single or find_index(folder) or folder / WEIGHTS


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A network's tensors."""
    return read_foreign(weights_file(folder))
