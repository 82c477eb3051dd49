"""DINOv2's names in torch.hub (`dinov2_vitb14_reg`), in which published GIDM checkpoints hold it."""

import math
from collections.abc import Mapping

from torch import Tensor
from transformers import Dinov2WithRegistersModel

from defi.checkpoints.names import Names, both
from defi.errors import UserError
from Step2_GIDM.dino import DinoConfig

POSITIONS = "pos_embed"
# Of the attention layers in transformers: since version 5, and before.
ATTENTION = (
    ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    ),
)


def hub_names(model: Dinov2WithRegistersModel) -> Names:
    """torch.hub's names, and the parts of transformers' model that each is made of."""
    present = model.state_dict().keys()
    query, key, value, out = next(
        names for names in ATTENTION if f"encoder.layer.0.{names[0]}.weight" in present
    )
    names: Names = {
        "cls_token": ("embeddings.cls_token",),
        POSITIONS: ("embeddings.position_embeddings",),
        "register_tokens": ("embeddings.register_tokens",),
        "mask_token": ("embeddings.mask_token",),
    }
    names |= both("patch_embed.proj", "embeddings.patch_embeddings.projection") | both("norm", "layernorm")
    for i in range(model.config.num_hidden_layers):
        theirs, ours = f"blocks.{i}", f"encoder.layer.{i}"
        names |= both(f"{theirs}.attn.qkv", *(f"{ours}.{part}" for part in (query, key, value)))
        names |= both(f"{theirs}.attn.proj", f"{ours}.{out}")
        for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            names |= both(f"{theirs}.{layer}", f"{ours}.{layer}")
        for scale in (1, 2):
            names[f"{theirs}.ls{scale}.gamma"] = (f"{ours}.layer_scale{scale}.lambda1",)
    return names


def hub_image_size(tensors: Mapping[str, Tensor], config: DinoConfig, *, source: object) -> int:
    """Side of the images, in pixels, that the position embeddings were made for (518 as published).

    Raises:
        UserError: they are missing or belong to no square of patches.
    """
    if POSITIONS not in tensors:
        raise UserError(f"{source}: holds no DINOv2 ({POSITIONS} is missing); give the complete checkpoint")
    patches = tensors[POSITIONS].shape[1] - 1
    if math.isqrt(patches) ** 2 != patches:
        raise UserError(
            f"{source}: {POSITIONS} has shape {tuple(tensors[POSITIONS].shape)}, expected 1 + n² positions"
        )
    return math.isqrt(patches) * config.patch
