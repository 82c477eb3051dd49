"""Published policies (stage 3), to and from ours.

A file of `torch.save`: under `model` the policy, in it the frozen towers: T5 (`lam.text_encoder.*`), stage
1's CLIP text tower (`TVP_encoder.text_encoder.*`, transformers' names) and the same CLIP once more under
OpenAI's names, for the sentence embedding (`language_goal.clip_rn50.*`). The video model is not in it.
"""

from collections.abc import Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor

from defi.checkpoints import clip
from defi.checkpoints.files import read_published
from defi.checkpoints.matching import LoadingReport, Names, below, compare, under
from defi.data.calvin import calvin_robot
from defi.errors import UserError
from Step1_GFDM import adapter as gfdm_adapter
from Step2_GIDM import adapter as gidm_adapter
from Step3_DeFI.config import PolicyConfig, check
from Step3_DeFI.gidm_branch import GIDMBranch
from Step3_DeFI.policy import DeFI
from Step3_DeFI.stages import language_of

TITLE = "published policy (DeFI stage 3)"
MARK = "Video_Former.latents"
FORMER, HEAD, LATENT = "Video_Former.", "model.inner_model.", "lam."
T5, CLIP, SENTENCE = "lam.text_encoder.", "TVP_encoder.text_encoder.", "language_goal.clip_rn50."
ROUNDING = 2e-3  # relative: OpenAI's towers are published in float16

# Published names → ours.
VIDEO_FORMER = Names(
    {
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
)

_BLOCK = {
    "ln_1": "attention_norm",
    "attn.query": "attention.query",
    "attn.key": "attention.key",
    "attn.value": "attention.value",
    "attn.c_proj": "attention.out",
    "ln_2": "feed_forward_norm",
    "mlp.c_fc": "feed_forward.0",
    "mlp.c_proj": "feed_forward.2",
}
_DECODER_BLOCK = _BLOCK | {
    "adaLN_zero.modulation": "modulation",
    "ln3": "cross_norm",
    "cross_att.query": "cross_attention.query",
    "cross_att.key": "cross_attention.key",
    "cross_att.value": "cross_attention.value",
    "cross_att.c_proj": "cross_attention.out",
}
ACTION_DENOISER = Names(
    {
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
)
ACTION_DENOISER_UNUSED = ("pos_emb", "goal_emb", "proprio_emb")
"""Published but never read in the forward pass: positions, image goals, robot state."""

GIDM_BRANCH = Names({"goal_emb": "project", "time_pos_emb": "frame_embedding"})
"""Without `lam.*`, which are stage 2's."""

UNNEEDED = {
    **{f"{HEAD}{name}": "published, but never read in the forward pass" for name in ACTION_DENOISER_UNUSED},
    "lam.dino_encoder.": "stage 2's image encoder; a policy reads features of the imagined video",
    "lam.decoder.": "stage 2's decoder; a policy keeps the encoder",
    "lam.patch_up.": "stage 2's decoder; a policy keeps the encoder",
    **{f"{SENTENCE}{name}": why for name, why in clip.UNNEEDED.items()},
}


def build(cfg: DictConfig) -> DeFI:
    """The policy of a preset, new, on a new video model and text tower."""
    gfdm, gidm = gfdm_adapter.build(cfg), gidm_adapter.build(cfg)
    return DeFI(PolicyConfig.from_preset(cfg, calvin_robot()), gfdm=gfdm, **language_of(gidm))


def publish(policy: DeFI) -> dict[str, Tensor]:
    """The trained part under the published names; UserError if these have no place for all of it."""
    kind, mode = policy.config.action_head.cross_attention, policy.config.finetune.mode
    rule = "a published policy's is causal, without positions; use preset=released, or causal here"
    check("policy.action_head.cross_attention", kind, kind == "causal", rule)
    rule = "a published file cannot hold a finetuned video model; use this project's checkpoint"
    check("gfdm.finetune", mode, mode == "none", rule)
    check("policy.state", policy.config.state, not policy.config.state, "a published policy reads no state")
    has = policy.config.latent_actions
    check("policy.latent_actions", has, has, "a published policy reads latent actions")
    return {
        **under(FORMER, VIDEO_FORMER.join(policy.video_former.state_dict())),
        **branch_to_published(policy.gidm_branch),
        **under(HEAD, ACTION_DENOISER.join(policy.action_head.state_dict())),
    }


def publish_towers(policy: DeFI) -> dict[str, Tensor]:
    """The frozen text towers that a published file holds besides."""
    tower = policy.gfdm.clip.model
    return {
        **under(T5, policy.t5.model.state_dict()),
        **under(CLIP, tower.state_dict()),
        **under(SENTENCE, clip.to_openai(tower)),
    }


def adopt(policy: DeFI, tensors: Mapping[str, Tensor], *, source: object) -> LoadingReport:
    """Load a published policy into `policy`, whose frozen towers must be the ones it was trained with: where
    the file holds them too, they are compared.
    """
    same = {T5: "frozen T5, equal to stage 2's", CLIP: "frozen CLIP, equal to stage 1's"}
    same |= {SENTENCE: "frozen CLIP once more, equal to stage 1's"}
    report = compare(tensors, publish(policy), source=source, unneeded=UNNEEDED | same).check()
    _check_towers(tensors, publish_towers(policy), source=source)
    policy.video_former.load_state_dict(VIDEO_FORMER.split(below(tensors, FORMER)))
    policy.action_head.load_state_dict(ACTION_DENOISER.split(below(tensors, HEAD)))
    load_branch(policy.gidm_branch, {name: tensors[name] for name in branch_to_published(policy.gidm_branch)})
    return report


def convert(cfg: DictConfig) -> tuple[DeFI, LoadingReport]:
    """The policy in the file `cfg.source`, on `cfg.gfdm_checkpoint` and `cfg.gidm_checkpoint`."""
    tensors = read_published(cfg.source, MARK, TITLE)
    config = PolicyConfig.from_preset(cfg, calvin_robot())
    policy = DeFI.from_stages(config, gfdm=cfg.gfdm_checkpoint, gidm=cfg.gidm_checkpoint)
    return policy, adopt(policy, tensors, source=cfg.source)


def branch_to_published(branch: GIDMBranch) -> dict[str, Tensor]:
    """The branch's tensors, stage 2's tokenizer included, under the published names."""
    own = GIDM_BRANCH.join(branch.state_dict())
    return own | under(LATENT, gidm_adapter.to_published(branch.tokenizer))


def load_branch(branch: GIDMBranch, tensors: Mapping[str, Tensor]) -> None:
    """Load `goal_emb`, `time_pos_emb` and `lam.*` (stage 2's encoder and codebook), strictly."""
    gidm_adapter.load_published(branch.tokenizer, below(tensors, LATENT), source="the policy")
    branch.load_state_dict(GIDM_BRANCH.split(tensors) | under("tokenizer.", branch.tokenizer.state_dict()))


def _check_towers(tensors: Mapping[str, Tensor], towers: Mapping[str, Tensor], *, source: object) -> None:
    """Refuse a policy whose frozen text towers are others than those it is put on."""
    prefix = f"{CLIP}text_model."  # only some versions of transformers give it
    ours = {name.replace(prefix, CLIP): tensor for name, tensor in towers.items()}
    for name, tensor in tensors.items():
        if not name.startswith((T5, CLIP, SENTENCE)) or name.startswith(tuple(UNNEEDED)):
            continue
        wanted = ours.get(name.replace(prefix, CLIP))
        if wanted is None:
            if name.endswith("position_ids"):  # a buffer of older versions of transformers
                continue
            raise UserError(f"{source}: {name} is not of its text tower; give the checkpoint of this stage")
        close = tensor.shape == wanted.shape
        if close and not (tensor.is_meta or wanted.is_meta):
            difference = torch.linalg.vector_norm(tensor.float() - wanted.float())
            close = bool(difference <= ROUNDING * torch.linalg.vector_norm(wanted.float()))
        if not close:
            stage = "gidm" if name.startswith(T5) else "gfdm"
            raise UserError(
                f"{source}: {name} differs from the text tower of {stage}_checkpoint; give the one that the "
                "policy was trained on"
            )
