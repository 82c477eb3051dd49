"""GFDM on disk: a diffusers folder that `StableVideoDiffusionPipeline.from_pretrained` opens.

model_index.json unet/ vae/ scheduler/     Stable Video Diffusion's parts under its names
image_encoder/ feature_extractor/          the pipeline class insists on them; text takes their place here
text/                                      the CLIP text tower, unless the configuration names its source
gfdm.json                                  GFDMConfig: frames, image size, fps, ... for the next stage
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
from defi.engine.state import preserved_rng
from defi.engine.weights import COPY_AGAIN, check_fit, load_strict
from defi.errors import UserError, one_line
from defi.files import check_sizes, read_json
from defi.processes import print_once
from defi.text import CLIPText
from Step1_GFDM.config import GFDMConfig, UNetSizes, VAESizes

if TYPE_CHECKING:
    from Step1_GFDM.model import GFDM

CONFIG = "gfdm.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED_WEIGHTS = (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
Part = TypeVar("Part", bound=ConfigMixin)

diffusers_logging.disable_progress_bar()


def _image_encoder(width: int) -> CLIPVisionModelWithProjection:
    """The smallest image tower of the right output width: unused, but the class opens nothing without."""
    sizes = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        patch_size=112,
        projection_dim=width,
    )
    with torch.device("meta"):  # its weights are zeros: a thread writes this while the training draws numbers
        tower = CLIPVisionModelWithProjection(sizes)
    tower.to_empty(device="cpu")
    for parameter in tower.parameters():
        nn.init.zeros_(parameter)
    return tower


def save(model: "GFDM", folder: Path) -> None:
    """Write the whole model, frozen parts included: the folder stands on its own."""
    StableVideoDiffusionPipeline(
        vae=model.vae,
        image_encoder=_image_encoder(model.unet.config.cross_attention_dim),
        unet=model.unet,
        scheduler=model.scheduler,
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(folder)
    if model.config.clip.pretrained is None:
        model.clip.save(folder / "text")
    (folder / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=1))


def read_config(folder: Path) -> GFDMConfig:
    """The configuration stored beside the weights."""
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{file}: missing, so this is no GFDM; give a checkpoint folder of Step1_GFDM.train")
    values = read_json(file, COPY_AGAIN)
    check_sizes(values, file)
    if "frame_step" not in values:
        told = f"of an earlier version, says no frame_step: taken as {GFDMConfig.frame_step}"
        print_once(f"{file}: {told}; if its clips had another, write it there")
    return typed(GFDMConfig, values, str(file))


def _part_config(cls: type[Part], folder: Path) -> dict:
    """A part's configuration, checked to be one of `cls`."""
    try:
        values = dict(cls.load_config(folder))
    except Exception as error:  # as in `_build`
        raise UserError(f"{folder}: no {cls.__name__} here; copy the checkpoint folder as a whole") from error
    check_sizes(values, folder / "config.json")
    if values.get("_class_name") != cls.__name__:
        raise UserError(f"{folder}: holds a {values.get('_class_name')}, expected {cls.__name__}")
    return values


def load_part(cls: type[Part], folder: Path) -> Part:
    """A network of a diffusers folder, every tensor accounted for."""
    tensors = read_weights(folder)
    with (
        preserved_rng(),
        torch.device("meta"),
    ):  # before memory is taken: a damaged file may ask for all
        check_fit(_build(cls, folder).state_dict(), tensors, source=weights_file(folder))
    model = _build(cls, folder)
    load_strict(model.state_dict(), tensors, source=weights_file(folder))
    return model.eval()


def _build(cls: type[Part], folder: Path) -> Part:
    """A part as its configuration describes it."""
    values = _part_config(cls, folder)
    try:
        return cls.from_config(values)
    except Exception as error:  # whatever a damaged configuration makes the library raise
        raise UserError(f"{folder}: describes no {cls.__name__} ({one_line(error)}); {COPY_AGAIN}") from error


def load_network(model: nn.Module, folder: Path) -> None:
    """Copy a diffusers network's weights into `model`, strictly."""
    load_strict(model.state_dict(), read_weights(folder), source=weights_file(folder))


def weights_file(folder: Path) -> Path:
    """Where a network's tensors lie: as this project writes them, or as a published folder may have them."""
    whole = next((folder / name for name in PUBLISHED_WEIGHTS if (folder / name).is_file()), None)
    return whole or find_index(folder) or folder / WEIGHTS


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A network's tensors."""
    file = weights_file(folder)
    if not file.is_file():
        raise UserError(f"{file}: missing; copy the checkpoint folder as a whole")
    return read_foreign(file)


def load_foreign(folder: Path, clip: CLIPText) -> tuple[dict[str, Any], dict[str, Any]]:
    """UNet, VAE and scheduler of any Stable Video Diffusion folder, and the sizes they bring along.

    Raises:
        UserError: a part is missing, or the text tower's width does not fit the UNet.
    """
    if not folder.is_dir():
        raise UserError(f"gfdm.pretrained={folder}: no such folder; give a Stable Video Diffusion folder")
    unet = load_part(UNetSpatioTemporalConditionModel, folder / "unet")
    vae = load_part(AutoencoderKLTemporalDecoder, folder / "vae")
    if unet.config.cross_attention_dim != 2 * clip.width:
        raise UserError(
            f"{folder}/unet: attends to width {unet.config.cross_attention_dim}, text.clip gives "
            f"2 x {clip.width}; choose the text tower it was trained with"
        )
    scheduler = _build(EulerDiscreteScheduler, folder / "scheduler")
    sizes = {
        "unet": UNetSizes(
            block_out_channels=list(unet.config.block_out_channels),
            num_attention_heads=list(unet.config.num_attention_heads),
            attention=[kind.startswith("CrossAttn") for kind in unet.config.down_block_types],
            layers_per_block=unet.config.layers_per_block,
            addition_time_embed_dim=unet.config.addition_time_embed_dim,
        ),
        "vae": VAESizes(
            block_out_channels=list(vae.config.block_out_channels),
            layers_per_block=vae.config.layers_per_block,
            latent_channels=vae.config.latent_channels,
        ),
    }
    return {"unet": unet, "vae": vae, "scheduler": scheduler}, sizes


def load_parts(folder: Path, config: GFDMConfig) -> dict[str, nn.Module | EulerDiscreteScheduler]:
    """Everything `GFDM` is made of, from the folder that `save` wrote."""
    named = config.clip.pretrained is not None
    clip = CLIPText.from_config(config.clip) if named else CLIPText.load(folder / "text", config.clip)
    return {
        "unet": load_part(UNetSpatioTemporalConditionModel, folder / "unet"),
        "vae": load_part(AutoencoderKLTemporalDecoder, folder / "vae"),
        "scheduler": _build(EulerDiscreteScheduler, folder / "scheduler"),
        "clip": clip,
    }
