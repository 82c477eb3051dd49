"""Names and layout of the published latent action model, to and from ours.

One table from our parameter names to the published ones; where ours is one tensor and theirs several
(q, k, v), the parts stand in the order in which they are stacked.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from defi.errors import UserError
from Step2_GIDM.latent_action import LatentActionSizes

Names = dict[str, tuple[str, ...]]
# Counters of the quantizer: state of a training run, not weights.
COUNTERS = ("usage", "recent", "restarts")


def _both(ours: str, published: str) -> Names:
    return {f"{ours}.{kind}": (f"{published}.{kind}",) for kind in ("weight", "bias")}


def _attention(ours: str, published: str) -> Names:
    parts = tuple(f"{published}.to_{part}.weight" for part in "qkv")
    return {f"{ours}.qkv.weight": parts, **_both(f"{ours}.out", f"{published}.to_out.0")}


def _input(ours: str, published: str) -> Names:
    return {k: v for i in range(3) for k, v in _both(f"{ours}.{i}", f"{published}.{i}").items()}


def _block(ours: str, published: str, *, temporal: bool) -> Names:
    norms = ("spatial_norm", "temporal_norm", "ffn_norm") if temporal else ("spatial_norm", "ffn_norm")
    names: Names = {}
    for i, norm in enumerate(norms, start=1):
        names |= _both(f"{ours}.{norm}", f"{published}.norm{i}")
    for kind in ("spatial", "temporal") if temporal else ("spatial",):
        names |= _attention(f"{ours}.{kind}", f"{published}.{kind}_attn")
    return names | _both(f"{ours}.ffn.0", f"{published}.ffn.0") | _both(f"{ours}.ffn.2", f"{published}.ffn.3")


def tokenizer_names(sizes: LatentActionSizes) -> Names:
    """`LatentActionTokenizer`'s parameters in the published model (below `lam.` in its checkpoints)."""
    names = _input("encoder.embed", "encoder.ffn")
    for i in range(sizes.blocks):
        names |= _block(f"encoder.blocks.{i}", f"encoder.transformer_blocks.{i}", temporal=True)
    if sizes.text_width is not None:
        names |= _both("encoder.embed_text", "lang_proj")
    names |= _both("encoder.to_code.0", "to_codebook") | _both("from_code", "action_up")
    if sizes.frozen_codes is None:
        return names | {
            "encoder.queries.0": ("action_latent",),
            "quantizer.codebook": ("vq.codebook.weight",),
        }
    names |= _both("encoder.to_code.1", "to_codebook_uncontrol")
    names |= _both("from_frozen_code", "action_up_uncontrol")
    return names | {
        "encoder.queries.0": ("action_latent_controllable",),
        "encoder.queries.1": ("action_latent",),
        "quantizer.codebook": ("vq_action.codebook.weight",),
        "frozen_quantizer.codebook": ("vq.codebook.weight",),
    }


def model_names(sizes: LatentActionSizes, *, decoder_blocks: int) -> Names:
    """`LatentActionModel`'s parameters in the published model."""
    names = {f"tokenizer.{ours}": theirs for ours, theirs in tokenizer_names(sizes).items()}
    names |= _both("decoder.embed_patches", "patch_up") | _input("decoder.embed", "decoder.ffn")
    for i in range(decoder_blocks):
        names |= _block(f"decoder.blocks.{i}", f"decoder.transformer_blocks.{i}", temporal=False)
    return names | _both("decoder.out", "decoder.out")


def from_published(tensors: Mapping[str, Tensor], names: Names, *, source: str) -> dict[str, Tensor]:
    """Our state dict from published tensors; a missing or unknown one is a `UserError` that names it."""
    wanted = {name for parts in names.values() for name in parts}
    if missing := sorted(wanted - set(tensors)):
        raise UserError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(set(tensors) - wanted):
        raise UserError(f"{source}: {len(extra)} tensors are not of this model, the first is {extra[0]}")
    return {ours: torch.cat([tensors[name] for name in parts]) for ours, parts in names.items()}


def to_published(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The inverse of `from_published` (also for gradients): our tensors under the published names."""
    published: dict[str, Tensor] = {}
    for ours, parts in names.items():
        if ours in state:
            published.update(zip(parts, state[ours].chunk(len(parts))))
    return {
        name: tensor[None, None] if name.startswith("action_latent") else tensor
        for name, tensor in published.items()
    }


def load_published(module: nn.Module, tensors: Mapping[str, Tensor], names: Names, *, source: str) -> None:
    """Load published tensors into `module`, strictly: names and shapes must fit, counters start at zero."""
    state = from_published(tensors, names, source=source)
    own = module.state_dict()
    for name, tensor in state.items():
        if tensor.numel() != own[name].numel():
            raise UserError(
                f"{source}: {names[name][0]} has shape {list(tensor.shape)}, expected {list(own[name].shape)}"
            )
        state[name] = tensor.reshape(own[name].shape)
    counters = {k: v for k, v in own.items() if k.rsplit(".", 1)[-1] in COUNTERS}
    module.load_state_dict(state | counters)
