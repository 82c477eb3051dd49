"""Published policies (stage 3), to and from ours.

A file of `torch.save`: under `model` the policy, in it the frozen towers: T5 (`lam.text_encoder.*`), stage
1's CLIP text tower (`TVP_encoder.text_encoder.*`, transformers' names) and the same CLIP once more under
OpenAI's names, for the sentence embedding (`language_goal.clip_rn50.*`). The video model is not in it.
"""

from collections.abc import Iterable, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor

from defi.checkpoints.account import Report, account, shapes
from defi.checkpoints.clip import IMAGE_TOWER, OTHER, to_openai
from defi.checkpoints.foreign import read_foreign
from defi.errors import UserError
from Step1_GFDM import adapter as gfdm_adapter
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.published import to_published, tokenizer_names
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.gidm_branch import GIDMBranch
from Step3_DeFI.policy import DeFI
from Step3_DeFI.published import (
    ACTION_DENOISER,
    ACTION_DENOISER_UNUSED,
    GIDM_BRANCH,
    VIDEO_FORMER,
    inverse,
    load_published_branch,
    rename,
)

TITLE = "published policy (DeFI stage 3)"
MARK = "Video_Former.latents"
FORMER, HEAD, LATENT = "Video_Former.", "model.inner_model.", "lam."
T5, CLIP, SENTENCE = "lam.text_encoder.", "TVP_encoder.text_encoder.", "language_goal.clip_rn50."
ROUNDING = 2e-3  # relative: OpenAI's towers are published in float16

SPARE = {
    **{f"{HEAD}{name}": "published, but never read in the forward pass" for name in ACTION_DENOISER_UNUSED},
    "lam.dino_encoder.": "stage 2's image encoder; a policy reads features of the imagined video",
    "lam.decoder.": "stage 2's decoder; a policy keeps the encoder",
    "lam.patch_up.": "stage 2's decoder; a policy keeps the encoder",
    **{f"{SENTENCE}{name}": "CLIP's image tower; instructions are text" for name in IMAGE_TOWER},
    **{f"{SENTENCE}{name}": "numbers of CLIP's training" for name in OTHER},
}


def recognises(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a published policy."""
    return MARK in names


def build(cfg: DictConfig) -> DeFI:
    """The policy of a preset, new, on a new video model and text tower."""
    gfdm, gidm = gfdm_adapter.build(cfg), gidm_adapter.build(cfg)
    return DeFI(PolicyConfig.from_preset(cfg), gfdm=gfdm, gidm=gidm)


def publish(policy: DeFI) -> dict[str, Tensor]:
    """The trained part under the published names.

    Raises:
        UserError: published files have no place for its positions, or for a video model finetuned along.
    """
    if policy.config.action_head.cross_attention == "full":
        raise UserError(
            "policy.action_head.cross_attention=full: a published policy's is causal, without positions; "
            "use preset=released, or policy.action_head.cross_attention=causal"
        )
    if policy.config.finetune.mode != "none":
        raise UserError(
            f"gfdm.finetune={policy.config.finetune.mode}: a published file cannot hold a finetuned video "
            "model; use this project's checkpoint"
        )
    former = rename(policy.video_former.state_dict(), inverse(VIDEO_FORMER))
    head = rename(policy.action_head.state_dict(), inverse(ACTION_DENOISER))
    branch, latent = _branch_state(policy.gidm_branch)
    return {
        **{FORMER + name: tensor for name, tensor in former.items()},
        **rename(branch, inverse(GIDM_BRANCH)),
        **{LATENT + name: tensor for name, tensor in latent.items()},
        **{HEAD + name: tensor for name, tensor in head.items()},
    }


def publish_towers(policy: DeFI) -> dict[str, Tensor]:
    """The frozen text towers that a published file holds besides."""
    clip = policy.gfdm.clip.model
    return {
        **{T5 + name: tensor for name, tensor in policy.t5.model.state_dict().items()},
        **{CLIP + name: tensor for name, tensor in clip.state_dict().items()},
        **{SENTENCE + name: tensor for name, tensor in to_openai(clip).items()},
    }


def adopt(policy: DeFI, tensors: Mapping[str, Tensor], *, source: object) -> Report:
    """Load a published policy into `policy`, whose frozen towers must be the ones it was trained with: where
    the file holds them too, they are compared.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a tower has other weights.
    """
    towers = publish_towers(policy)
    same = {T5: "frozen T5, equal to stage 2's", CLIP: "frozen CLIP, equal to stage 1's"}
    reasons = {**SPARE, **same, SENTENCE: "frozen CLIP once more, equal to stage 1's"}
    own = shapes(publish(policy))
    report = account(tensors, own, source=source, spare=reasons).demand()
    _compare(tensors, towers, source=source)
    _load(policy, {name: tensors[name] for name in own})
    return report


def convert(cfg: DictConfig) -> tuple[DeFI, Report]:
    """The policy in the file `cfg.source`, on `cfg.gfdm_checkpoint` and `cfg.gidm_checkpoint`."""
    tensors = read_foreign(cfg.source)
    if not recognises(tensors):
        raise UserError(
            f"{cfg.source}: no published policy (no {MARK}); give its checkpoint, or another stage="
        )
    config = PolicyConfig.from_preset(cfg)
    policy = DeFI.from_stages(config, gfdm=cfg.gfdm_checkpoint, gidm=cfg.gidm_checkpoint)
    return policy, adopt(policy, tensors, source=cfg.source)


def _load(policy: DeFI, published: dict[str, Tensor]) -> None:
    def below(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in published.items() if n.startswith(prefix)}

    policy.video_former.load_state_dict(rename(below(FORMER), VIDEO_FORMER))
    policy.action_head.load_state_dict(rename(below(HEAD), ACTION_DENOISER))
    branch = {n: t for n, t in published.items() if not n.startswith((FORMER, HEAD))}
    load_published_branch(policy.gidm_branch, branch)


def _branch_state(branch: GIDMBranch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The branch's own tensors under our names, and the tokenizer's under the published ones."""
    own = {n: t for n, t in branch.state_dict().items() if not n.startswith("tokenizer.")}
    names = tokenizer_names(branch.tokenizer.sizes)
    return own, to_published(branch.tokenizer.state_dict(), names)


def _compare(tensors: Mapping[str, Tensor], towers: Mapping[str, Tensor], *, source: object) -> None:
    """Refuse a policy whose frozen text towers are others than those it is put on."""
    ours = {_plain(name): tensor for name, tensor in towers.items()}
    for name, tensor in tensors.items():
        if not name.startswith((T5, CLIP, SENTENCE)) or name.startswith(tuple(SPARE)):
            continue
        wanted = ours.get(_plain(name))
        if wanted is None and name.endswith("position_ids"):
            continue  # a buffer that older versions of transformers save
        if wanted is None:
            raise UserError(f"{source}: {name} is not of its text tower; give the checkpoint of this stage")
        if tensor.shape != wanted.shape:
            found, expected = tuple(tensor.shape), tuple(wanted.shape)
            raise UserError(
                f"{source}: {name} has shape {found}, the text tower it is put on {expected}; "
                "give the stage-1 and stage-2 checkpoints it was trained on"
            )
        if not _close(tensor, wanted):
            stage = "gidm_checkpoint" if name.startswith(T5) else "gfdm_checkpoint"
            raise UserError(
                f"{source}: {name} differs from the text tower of {stage}; give the one it was trained on"
            )


def _close(found: Tensor, wanted: Tensor) -> bool:
    if found.is_meta or wanted.is_meta:
        return True
    difference = torch.linalg.vector_norm(found.float() - wanted.float())
    return bool(difference <= ROUNDING * torch.linalg.vector_norm(wanted.float()))


def _plain(name: str) -> str:
    """Without the prefix that only some versions of transformers give to CLIP's text tower."""
    return name.replace(f"{CLIP}text_model.", CLIP)
