"""Stable Video Diffusion's networks: new ones at the sizes of a preset, and those of a diffusers folder,
which `StableVideoDiffusionPipeline.from_pretrained` opens.

model_index.json unet/ vae/ scheduler/     Stable Video Diffusion's parts under its names
image_encoder/ feature_extractor/          the pipeline class insists on them; text takes their place here
"""

from dataclasses import asdict, fields
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
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from defi.checkpoints.files import find_index, read_foreign
from defi.engine.state import preserved_rng
from defi.engine.weights import COPY_AGAIN, check_fit, load_strict
from defi.errors import UserError, reading
from defi.files import check_sizes, read_json
from Step1_GFDM.config import GFDMConfig, UNetSizes, VAESizes

WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED_WEIGHTS = (WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
Part = TypeVar("Part", bound=ConfigMixin)

diffusers_logging.disable_progress_bar()


def build_scheduler() -> EulerDiscreteScheduler:
    """SVD's sampling schedule: v-prediction, Karras sigmas 0.002…700, continuous timesteps ln(sigma)/4.

    Its few numbers stay in main memory: on a GPU each would have to be waited for.
    """
    with torch.device("cpu"):  # whatever device the networks are being built on
        return EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="leading",
            timestep_type="continuous",
            steps_offset=1,
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        )


def build_vae(sizes: VAESizes, image_size: int) -> AutoencoderKLTemporalDecoder:
    """A temporal VAE with random weights."""
    kinds = ["DownEncoderBlock2D"] * len(sizes.block_out_channels)
    return AutoencoderKLTemporalDecoder(down_block_types=kinds, sample_size=image_size, **asdict(sizes))


def build_unet(config: GFDMConfig, text_width: int) -> UNetSpatioTemporalConditionModel:
    """A UNet with random weights; text tokens come concatenated with themselves, hence twice their width."""
    sizes = asdict(config.unet)
    names = {True: "CrossAttn{}BlockSpatioTemporal", False: "{}BlockSpatioTemporal"}
    kinds = [names[has] for has in sizes.pop("attention")]
    return UNetSpatioTemporalConditionModel(
        sample_size=config.latent_size,
        in_channels=2 * config.vae.latent_channels,
        out_channels=config.vae.latent_channels,
        down_block_types=[kind.format("Down") for kind in kinds],
        up_block_types=[kind.format("Up") for kind in reversed(kinds)],
        cross_attention_dim=2 * text_width,
        projection_class_embeddings_input_dim=3 * config.unet.addition_time_embed_dim,
        num_frames=config.frames,
        **sizes,
    )


def save(folder: Path, **parts: Any) -> None:
    """Write unet, vae and scheduler."""
    # The class opens nothing without an image tower: the smallest of the right width, of zeros, for a thread
    # writes this while the training draws random numbers.
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    width = parts["unet"].config.cross_attention_dim
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, patch_size=112, projection_dim=width))
    tower.to_empty(device="cpu")
    for parameter in tower.parameters():
        nn.init.zeros_(parameter)
    pipeline = StableVideoDiffusionPipeline(
        image_encoder=tower, feature_extractor=CLIPImageProcessor(), **parts
    )
    pipeline.save_pretrained(folder)


def load(folder: Path) -> dict[str, Any]:
    """unet, vae and scheduler of a Stable Video Diffusion folder. Raises UserError if one is missing."""
    return {
        "unet": load_part(UNetSpatioTemporalConditionModel, folder / "unet"),
        "vae": load_part(AutoencoderKLTemporalDecoder, folder / "vae"),
        "scheduler": _build(EulerDiscreteScheduler, folder / "scheduler"),
    }


def load_foreign(folder: Path, text_width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`load`, and the sections `unet` and `vae` of a `GFDMConfig` from which such networks would be built."""
    if not folder.is_dir():
        raise UserError(f"gfdm.pretrained={folder}: no such folder; give a Stable Video Diffusion folder")
    parts = load(folder)
    unet, vae = parts["unet"].config, parts["vae"].config
    if unet.cross_attention_dim != 2 * text_width:
        raise UserError(
            f"{folder}/unet: attends to width {unet.cross_attention_dim}, text.clip gives 2 x {text_width}; "
            "choose the text tower it was trained with"
        )
    attention = [kind.startswith("CrossAttn") for kind in unet.down_block_types]
    found = {"unet": (UNetSizes, {**unet, "attention": attention}), "vae": (VAESizes, vae)}
    sizes = {}
    for name, (cls, values) in found.items():
        values = {field.name: values[field.name] for field in fields(cls)}
        sizes[name] = cls(**{key: list(v) if isinstance(v, tuple) else v for key, v in values.items()})
    return parts, sizes


def load_part(cls: type[Part], folder: Path) -> Part:
    """A network of a diffusers folder, every tensor accounted for."""
    source = weights_file(folder)
    tensors = read_foreign(source)
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
    source = weights_file(folder)
    load_strict(model.state_dict(), read_foreign(source), source=source)


def weights_file(folder: Path) -> Path:
    """Where a network's tensors lie: as this project writes them, or as a published folder may have them."""
    single = next((folder / name for name in PUBLISHED_WEIGHTS if (folder / name).is_file()), None)
    return single or find_index(folder) or folder / WEIGHTS
