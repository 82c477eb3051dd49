"""Published GIDM checkpoints, to and from ours.

A Lightning file (`lam_idm.ckpt`): under `state_dict` the latent action model as `lam.*`, in it DINOv2 under
torch.hub's names (`lam.dino_encoder.*`) and T5 (`lam.text_encoder.*`). UniVLA's controllable model, which has
no text, is read with gidm.variant=controllable.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import Dinov2WithRegistersModel

from defi.checkpoints.files import read_published
from defi.checkpoints.matching import LoadingReport, Names, below, compare, under
from defi.errors import reading
from defi.text import T5Text
from Step2_GIDM.dino import DinoConfig, DinoPatches
from Step2_GIDM.latent_action import LatentActionTokenizer
from Step2_GIDM.model import GIDM, GIDMConfig

TITLE = "published GIDM (Lightning)"
MARK = "lam.patch_up.weight"
LATENT, DINO, T5 = "lam.", "lam.dino_encoder.", "lam.text_encoder."

# The latent action model: our names → published.


def _block(ours: str, theirs: str, *kinds: str) -> dict[str, str | tuple[str, ...]]:
    """Names of a block with attention of these kinds, each with its norm, then a feed-forward layer."""
    table: dict[str, str | tuple[str, ...]] = {}
    for i, kind in enumerate([*kinds, "ffn"], start=1):
        table[f"{ours}.{kind}_norm"] = f"{theirs}.norm{i}"
    for kind in kinds:
        table[f"{ours}.{kind}.qkv"] = tuple(f"{theirs}.{kind}_attn.to_{part}" for part in "qkv")
        table[f"{ours}.{kind}.out"] = f"{theirs}.{kind}_attn.to_out.0"
    return table | {f"{ours}.ffn.0": f"{theirs}.ffn.0", f"{ours}.ffn.2": f"{theirs}.ffn.3"}


_TOKENIZER = {
    "encoder.embed": "encoder.ffn",
    **_block("encoder.blocks.*", "encoder.transformer_blocks.*", "spatial", "temporal"),
    "encoder.embed_text": "lang_proj",
    "encoder.to_code.0": "to_codebook",
    "from_code": "action_up",
}
_LANGUAGE = {"encoder.queries.0": "action_latent", "quantizer.codebook": "vq.codebook.weight"}
_CONTROLLABLE = {
    "encoder.to_code.1": "to_codebook_uncontrol",
    "from_frozen_code": "action_up_uncontrol",
    "encoder.queries.0": "action_latent_controllable",
    "encoder.queries.1": "action_latent",
    "quantizer.codebook": "vq_action.codebook.weight",
    "frozen_quantizer.codebook": "vq.codebook.weight",
}
_DECODER = {
    "decoder.embed_patches": "patch_up",
    "decoder.embed": "decoder.ffn",
    **_block("decoder.blocks.*", "decoder.transformer_blocks.*", "spatial"),
    "decoder.out": "decoder.out",
}
# Counters of the quantizer: state of a training run, not weights.
COUNTERS = ("usage", "recent", "restarts")


def names_of(module: nn.Module) -> Names:
    """The table for a `LatentActionModel` or a `LatentActionTokenizer`."""
    tokenizer = module if isinstance(module, LatentActionTokenizer) else module.tokenizer
    table = _TOKENIZER | (_LANGUAGE if tokenizer.sizes.frozen_codes is None else _CONTROLLABLE)
    if module is not tokenizer:
        table = {f"tokenizer.{ours}": theirs for ours, theirs in table.items()} | _DECODER
    return Names(table)


def to_published(module: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A latent action model's or tokenizer's tensors (or gradients, by name) under the published names."""
    split = names_of(module).split(module.state_dict() if tensors is None else tensors)
    return {name: t[None, None] if name.startswith("action_latent") else t for name, t in split.items()}


def load_published(module: nn.Module, tensors: Mapping[str, Tensor], *, source: object) -> LoadingReport:
    """Load published tensors into `module`, strictly; its counters stay as they are."""
    report, own = compare(tensors, to_published(module), source=source).check(), module.state_dict()
    counters = {name: tensor for name, tensor in own.items() if name.rsplit(".", 1)[-1] in COUNTERS}
    weights = names_of(module).join(tensors)
    module.load_state_dict(counters | {name: t.reshape(own[name].shape) for name, t in weights.items()})
    return report


# DINOv2: torch.hub's names → transformers'.
POSITIONS = "pos_embed"
_DINO = {
    "cls_token": "embeddings.cls_token",
    POSITIONS: "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    **{f"blocks.*.{layer}": f"encoder.layer.*.{layer}" for layer in ("norm1", "norm2", "mlp")},
    **{f"blocks.*.ls{scale}.gamma": f"encoder.layer.*.layer_scale{scale}.lambda1" for scale in (1, 2)},
}


def dino_names(model: Dinov2WithRegistersModel) -> Names:
    """torch.hub's names (`dinov2_vitb14_reg`), and those of transformers' model."""
    if "encoder.layer.0.attention.o_proj.weight" in model.state_dict():  # since version 5
        qkv, out = [f"{part}_proj" for part in "qkv"], "o_proj"
    else:
        qkv, out = [f"attention.{part}" for part in ("query", "key", "value")], "output.dense"
    attention = {
        "blocks.*.attn.qkv": tuple(f"encoder.layer.*.attention.{part}" for part in qkv),
        "blocks.*.attn.proj": f"encoder.layer.*.attention.{out}",
    }
    return Names(_DINO | attention)


def dino_image_size(tensors: Mapping[str, Tensor], config: DinoConfig, *, source: object) -> int:
    """Side of the images, in pixels, that the position embeddings were made for (518 as published)."""
    with reading(str(source), f"give the complete checkpoint, with DINOv2's {POSITIONS}"):
        return math.isqrt(tensors[POSITIONS].shape[1] - 1) * config.patch


def build(cfg: DictConfig) -> GIDM:
    """The model of a preset, new."""
    return GIDM(GIDMConfig.from_preset(cfg))


def publish(model: GIDM) -> dict[str, Tensor]:
    """The trained part under the published names."""
    return under(LATENT, to_published(model.core))


def publish_towers(model: GIDM) -> dict[str, Tensor]:
    """The frozen encoders that a published file holds besides."""
    dino = model.dino.model
    towers = under(DINO, dino_names(dino).join(dino.state_dict()))
    if model.config.variant == "language":
        towers |= under(T5, model.text.model.state_dict())
    return towers


def adopt(model: GIDM, tensors: Mapping[str, Tensor], *, source: object) -> LoadingReport:
    """Load a published checkpoint into `model`, encoders included; errors as `LoadingReport.check`."""
    trained = publish(model)
    report = compare(tensors, trained | publish_towers(model), source=source).check()
    load_published(model.core, below({name: tensors[name] for name in trained}, LATENT), source=source)
    dino = model.dino.model
    dino.load_state_dict(dino_names(dino).split(below(tensors, DINO)))
    if text := below(tensors, T5):
        model.text.model.load_state_dict(text)
    return report


def convert(cfg: DictConfig) -> tuple[GIDM, LoadingReport]:
    """The GIDM in the file `cfg.source`, at the sizes of a preset; its encoders are saved with it.

    T5's tokenizer, which the file does not hold, comes from `text.t5.pretrained`.
    """
    tensors = read_published(cfg.source, MARK, TITLE)
    preset = GIDMConfig.from_preset(cfg)
    dino, text = (replace(part, pretrained=None) for part in (preset.dino, preset.text))
    positions = dino_image_size(below(tensors, DINO), dino, source=cfg.source)
    model = GIDM(
        replace(preset, dino=dino, text=text),
        dino=DinoPatches.from_config(dino, positions=positions),
        text=T5Text.from_config(preset.text),
    )
    return model, adopt(model, tensors, source=cfg.source)
