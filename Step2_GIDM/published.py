"""Names and layout of the published latent action model, to and from ours.

One table from our parameter names to the published ones; where ours is one tensor and theirs several
(q, k, v), the parts stand in the order in which they are stacked.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from defi.checkpoints.account import Report, account, shapes
from defi.checkpoints.names import Names, both, join, split
from Step2_GIDM.latent_action import LatentActionSizes

# Counters of the quantizer: state of a training run, not weights.
COUNTERS = ("usage", "recent", "restarts")


def _attention(ours: str, published: str) -> Names:
    parts = tuple(f"{published}.to_{part}.weight" for part in "qkv")
    return {f"{ours}.qkv.weight": parts, **both(f"{ours}.out", f"{published}.to_out.0")}


def _input(ours: str, published: str) -> Names:
    return {k: v for i in range(3) for k, v in both(f"{ours}.{i}", f"{published}.{i}").items()}


def _block(ours: str, published: str, *, temporal: bool) -> Names:
    norms = ("spatial_norm", "temporal_norm", "ffn_norm") if temporal else ("spatial_norm", "ffn_norm")
    names: Names = {}
    for i, norm in enumerate(norms, start=1):
        names |= both(f"{ours}.{norm}", f"{published}.norm{i}")
    for kind in ("spatial", "temporal") if temporal else ("spatial",):
        names |= _attention(f"{ours}.{kind}", f"{published}.{kind}_attn")
    return names | both(f"{ours}.ffn.0", f"{published}.ffn.0") | both(f"{ours}.ffn.2", f"{published}.ffn.3")


def tokenizer_names(sizes: LatentActionSizes) -> Names:
    """`LatentActionTokenizer`'s parameters in the published model (below `lam.` in its checkpoints)."""
    names = _input("encoder.embed", "encoder.ffn")
    for i in range(sizes.blocks):
        names |= _block(f"encoder.blocks.{i}", f"encoder.transformer_blocks.{i}", temporal=True)
    if sizes.text_width is not None:
        names |= both("encoder.embed_text", "lang_proj")
    names |= both("encoder.to_code.0", "to_codebook") | both("from_code", "action_up")
    if sizes.frozen_codes is None:
        return names | {
            "encoder.queries.0": ("action_latent",),
            "quantizer.codebook": ("vq.codebook.weight",),
        }
    names |= both("encoder.to_code.1", "to_codebook_uncontrol")
    names |= both("from_frozen_code", "action_up_uncontrol")
    return names | {
        "encoder.queries.0": ("action_latent_controllable",),
        "encoder.queries.1": ("action_latent",),
        "quantizer.codebook": ("vq_action.codebook.weight",),
        "frozen_quantizer.codebook": ("vq.codebook.weight",),
    }


def model_names(sizes: LatentActionSizes, *, decoder_blocks: int) -> Names:
    """`LatentActionModel`'s parameters in the published model."""
    names = {f"tokenizer.{ours}": theirs for ours, theirs in tokenizer_names(sizes).items()}
    names |= both("decoder.embed_patches", "patch_up") | _input("decoder.embed", "decoder.ffn")
    for i in range(decoder_blocks):
        names |= _block(f"decoder.blocks.{i}", f"decoder.transformer_blocks.{i}", temporal=False)
    return names | both("decoder.out", "decoder.out")


def to_published(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our tensors (weights or gradients) under the published names."""
    return {
        name: tensor[None, None] if name.startswith("action_latent") else tensor
        for name, tensor in split(state, names).items()
    }


def copy_published(module: nn.Module, tensors: Mapping[str, Tensor], names: Names) -> None:
    """Copy published tensors, which must be complete, into `module`; its counters stay as they are."""
    own = module.state_dict()
    counters = {name: tensor for name, tensor in own.items() if name.rsplit(".", 1)[-1] in COUNTERS}
    weights = {name: tensor.reshape(own[name].shape) for name, tensor in join(tensors, names).items()}
    module.load_state_dict(weights | counters)


def load_published(
    module: nn.Module, tensors: Mapping[str, Tensor], names: Names, *, source: object
) -> Report:
    """Load published tensors into `module`, strictly: a name or shape that does not fit is a `UserError`."""
    report = account(tensors, shapes(to_published(module.state_dict(), names)), source=source).demand()
    copy_published(module, tensors, names)
    return report
