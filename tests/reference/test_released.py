"""Adapters against the names and shapes of the released checkpoints, at full size, on the meta device."""

from pathlib import Path

import pytest
import torch
from checkpoint_fakes import manifest_part
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from defi.config import compose_preset
from defi.data.calvin import calvin_robot
from defi.errors import UserError
from defi.text import CLIPText, T5Text, TextConfig
from Step1_GFDM.adapter import build as build_gfdm
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.adapter import dino_image_size
from Step2_GIDM.dino import DinoPatches
from Step2_GIDM.model import GIDM, GIDMConfig
from Step3_DeFI import adapter as policy_adapter
from Step3_DeFI.config import PolicyConfig
from Step3_DeFI.policy import DeFI
from Step3_DeFI.stages import language_of

GIDM_FILES = {"language": "gidm_stage2_checkpoint", "controllable": "gidm_controllable"}
DINO_POSITIONS = 518  # pixels; dinov2_vitb14_reg's
# torch.hub's dinov2_vitb14_reg: a few of its 176 tensors, which the manifest does not list.
DINO_HUB = {
    "cls_token": (1, 1, 768),
    "pos_embed": (1, 1370, 768),
    "register_tokens": (1, 4, 768),
    "mask_token": (1, 768),
    "patch_embed.proj.weight": (768, 3, 14, 14),
    "blocks.11.attn.qkv.weight": (2304, 768),
    "blocks.0.attn.qkv.bias": (2304,),
    "blocks.3.attn.proj.weight": (768, 768),
    "blocks.5.ls1.gamma": (768,),
    "blocks.5.ls2.gamma": (768,),
    "blocks.7.mlp.fc1.weight": (3072, 768),
    "blocks.7.norm2.bias": (768,),
    "norm.weight": (768,),
}


def meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def t5_base() -> T5Text:
    sizes = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    return T5Text(T5EncoderModel(sizes), None, TextConfig())


def clip_base() -> CLIPText:
    return CLIPText(CLIPTextModelWithProjection(CLIPTextConfig()), None, TextConfig())


def build_gidm(variant: str) -> GIDM:
    config = GIDMConfig.from_preset(compose_preset("released", f"gidm.variant={variant}"))
    with torch.device("meta"):
        dino = DinoPatches.from_config(config.dino, positions=DINO_POSITIONS)
        return GIDM(config, dino=dino, text=t5_base())


@pytest.fixture(scope="module")
def policy() -> DeFI:
    cfg = compose_preset("released")
    with torch.device("meta"):
        gfdm = build_gfdm(cfg)
        gfdm.clip = clip_base()
        return DeFI(
            PolicyConfig.from_preset(cfg, calvin_robot()), gfdm=gfdm, **language_of(build_gidm("language"))
        )


@pytest.mark.parametrize("variant", GIDM_FILES)
def test_gidm(reference: Path, variant: str) -> None:
    released = meta(manifest_part(reference, GIDM_FILES[variant]))
    model = build_gidm(variant)
    ours = gidm_adapter.publish(model) | gidm_adapter.publish_towers(model)
    listed = {name: t for name, t in ours.items() if not name.startswith(gidm_adapter.DINO)}
    assert {n: t.shape for n, t in listed.items()} == {n: t.shape for n, t in released.items()}
    dino = {n.removeprefix(gidm_adapter.DINO): tuple(t.shape) for n, t in ours.items() if n not in listed}
    assert len(dino) == 176 and {name: dino[name] for name in DINO_HUB} == DINO_HUB
    assert dino_image_size(meta(dino), model.config.dino, source="file") == DINO_POSITIONS
    report = gidm_adapter.adopt(
        model, released | meta({gidm_adapter.DINO + n: s for n, s in dino.items()}), source="x"
    )
    assert set(report.loaded) == set(ours) and not report.left_over


def test_policy(reference: Path, policy: DeFI) -> None:
    released = manifest_part(reference, "defi_stage3_checkpoint")
    report = policy_adapter.adopt(policy, meta(released), source="policy.pt")
    left_over = [name for names in report.left_over.values() for name in names]
    assert sorted([*report.loaded, *left_over]) == sorted(released)
    unused = [name for name in left_over if not name.startswith((policy_adapter.T5, policy_adapter.CLIP))]
    assert all(name.split(".")[2] in ("pos_emb", "goal_emb", "proprio_emb") for name in unused)
    towers = policy_adapter.publish_towers(policy)
    assert set(left_over) - set(unused) <= set(towers)


def test_parameters_of_the_policy(reference: Path, policy: DeFI) -> None:
    """Trained: what the released file holds, less frozen towers and what the forward pass never reads."""
    released = manifest_part(reference, "defi_stage3_checkpoint")
    spare = (policy_adapter.T5, policy_adapter.CLIP, *policy_adapter.UNNEEDED)
    expected = sum(t.numel() for n, t in meta(released).items() if not n.startswith(spare))
    assert sum(p.numel() for _, p in policy.trainable()) == expected


def test_a_full_size_gidm_of_another_shape_is_refused(reference: Path) -> None:
    released = meta(manifest_part(reference, GIDM_FILES["language"]))
    name = "lam.vq.codebook.weight"
    released[name] = torch.empty(32, 128, device="meta")
    with pytest.raises(UserError, match=rf"lam_idm.ckpt: {name} has shape \(32, 128\), expected \(16, 128\)"):
        gidm_adapter.adopt(build_gidm("language"), released, source="lam_idm.ckpt")
