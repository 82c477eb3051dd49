"""Names of the published stage-3 weights and of ours.

Each table maps a published name to ours; `*` stands for a layer number, and a name for everything below it.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from defi.errors import UserError
from Step2_GIDM.published import load_published, tokenizer_names
from Step3_DeFI.gidm_branch import GIDMBranch

Names = Mapping[str, str]

VIDEO_FORMER: Names = {
    "goal_emb": "project",
    "latents": "queries",
    "time_pos_emb": "frame_embedding",
    "layers.*.0.norm_media": "layers.*.cross.feature_norm",
    "layers.*.0.norm_latents": "layers.*.cross.query_norm",
    "layers.*.0.to_q": "layers.*.cross.to_query",
    "layers.*.0.to_k": "layers.*.cross.to_key",
    "layers.*.0.to_v": "layers.*.cross.to_value",
    "layers.*.0.to_out": "layers.*.cross.to_out",
    "layers.*.1.qkv": "layers.*.temporal.qkv",
    "layers.*.1.proj": "layers.*.temporal.to_out",
    "layers.*.2": "layers.*.feed_forward",
    "norm": "norm",
}

_ATTENTION = {"query": "query", "key": "key", "value": "value", "c_proj": "out"}
_BLOCK = {
    "ln_1": "attention_norm",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.0",
    "mlp.c_proj": "feed_forward.2",
    **{f"attn.{theirs}": f"attention.{ours}" for theirs, ours in _ATTENTION.items()},
}
_DECODER_BLOCK = {
    **_BLOCK,
    "adaLN_zero.modulation": "modulation",
    "ln3": "cross_norm",
    **{f"cross_att.{theirs}": f"cross_attention.{ours}" for theirs, ours in _ATTENTION.items()},
}
ACTION_DENOISER: Names = {
    "lang_emb": "embed_sentence",
    "tok_emb": "embed_video",
    "tok_emb_token": "embed_latent_action",
    "sigma_emb.1": "embed_sigma.mlp.0",
    "sigma_emb.3": "embed_sigma.mlp.2",
    "action_emb": "embed_action",
    "action_pred": "predict",
    "encoder.ln": "encoder_norm",
    "decoder.ln": "decoder_norm",
    **{f"encoder.blocks.*.{theirs}": f"encoder.*.{ours}" for theirs, ours in _BLOCK.items()},
    **{f"decoder.blocks.*.{theirs}": f"decoder.*.{ours}" for theirs, ours in _DECODER_BLOCK.items()},
}
ACTION_DENOISER_UNUSED = ("pos_emb", "goal_emb", "proprio_emb")
"""Published but never read in the forward pass: positions, image goals, robot state."""

GIDM_BRANCH: Names = {"goal_emb": "project", "time_pos_emb": "frame_embedding"}
"""Without `lam.*`, which are stage 2's."""


def rename(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Published names → ours. Every tensor must have a name in the table."""
    rules = [
        (re.compile(re.escape(theirs).replace(r"\*", r"(\d+)") + r"((?:\..*)?)"), ours.replace("*", r"\1"))
        for theirs, ours in names.items()
    ]
    renamed = {}
    for name, tensor in weights.items():
        for pattern, ours in rules:
            if match := pattern.fullmatch(name):
                renamed[match.expand(ours) + match.groups()[-1]] = tensor
                break
        else:
            raise UserError(
                f"{name}: no such tensor in the published model; leave it out or name its purpose"
            )
    return renamed


def inverse(names: Names) -> dict[str, str]:
    """The table for the way back, ours → published."""
    return {ours: theirs for theirs, ours in names.items()}


def without(weights: Mapping[str, Tensor], unused: tuple[str, ...]) -> dict[str, Tensor]:
    """`weights` less the named modules and parameters."""
    return {name: tensor for name, tensor in weights.items() if name.split(".")[0] not in unused}


def load_published_branch(
    branch: GIDMBranch, weights: Mapping[str, Tensor], *, source: str = "weights"
) -> None:
    """Load `goal_emb`, `time_pos_emb` and `lam.*` (stage 2's encoder and codebook) into our branch."""
    latent_action = {n.removeprefix("lam."): t for n, t in weights.items() if n.startswith("lam.")}
    load_published(branch.tokenizer, latent_action, tokenizer_names(branch.tokenizer.sizes), source=source)
    own = rename({n: t for n, t in weights.items() if not n.startswith("lam.")}, GIDM_BRANCH)
    branch.load_state_dict(
        own | {f"tokenizer.{name}": tensor for name, tensor in branch.tokenizer.state_dict().items()}
    )
