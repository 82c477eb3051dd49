"""Files of other projects, written by the tests under the released names, small or on the meta device."""

import functools
import json
import shutil
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from policy_fakes import PRESET, TEXT
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from defi.text import CLIPText, T5Text, TextConfig
from Step1_GFDM.model import GFDM
from Step2_GIDM import adapter as gidm_adapter
from Step2_GIDM.model import GIDM
from Step3_DeFI import adapter as policy_adapter
from Step3_DeFI.policy import DeFI

DINO = {"image_size": 28, "width": 16, "layers": 1, "heads": 2}
# As the published policy: nothing in it that the released file does not have.
PLAIN_HEAD = {"cross_attention": "causal", "identity_modulation": False}


def preset(towers: Path | None = None, **settings: object) -> DictConfig:
    """A preset of the sizes of `policy_fakes`; `towers`: the folder that `write_towers` filled."""
    gidm = {"width": 16, "encoder_blocks": 1, "decoder_blocks": 1, "heads": 2, "codes": 8, "code_width": 8}
    policy = PRESET["policy"] | {
        "standardise": False,
        "merge": 1,
        "action_head": PRESET["policy"]["action_head"] | PLAIN_HEAD,
    }
    cfg = OmegaConf.create(
        {"preset_name": "test", **PRESET, "gidm": gidm | {"dino": DINO}, "policy": policy, **settings}
    )
    if towers is not None:
        cfg.text.clip.pretrained = str(towers / "clip")
        cfg.text.t5.pretrained = str(towers / "t5")
    return cfg


def write_towers(folder: Path) -> Path:
    """Hugging Face folders of a small CLIP and a small T5."""
    CLIPText.from_config(TextConfig(**TEXT | {"seed": 1})).save(folder / "clip")
    T5Text.from_config(TextConfig(**TEXT | {"seed": 2})).save(folder / "t5")
    return folder


def write_gidm(model: GIDM, file: Path) -> dict[str, Tensor]:
    """A Lightning checkpoint as published: more in it than the weights."""
    tensors = gidm_adapter.publish(model) | gidm_adapter.publish_towers(model)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    lightning = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": tensors,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 3}}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "hyper_parameters": {
            "lam_latent_dim": 8,
            "task_name": "x",
            "optimizer": torch.optim.AdamW,
            "schedule": functools.partial(torch.optim.AdamW, lr=1e-4),
        },
    }
    torch.save(lightning, file)
    return tensors


def write_policy(policy: DeFI, file: Path) -> dict[str, Tensor]:
    """A stage-3 file as published, with the parts that are in it and never used."""
    tensors = policy_adapter.publish(policy) | policy_adapter.publish_towers(policy)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    dim = policy.config.action_head.dim
    sentence = policy_adapter.SENTENCE
    unused = {
        "model.inner_model.pos_emb": (1, 235, dim),
        "model.inner_model.goal_emb.0.weight": (2 * dim, 16),
        "model.inner_model.proprio_emb.0.bias": (2 * dim,),
        f"{sentence}visual.conv1.weight": (8, 3, 4, 4),
        f"{sentence}logit_scale": (),
    }
    tensors |= {name: torch.randn(shape) for name, shape in unused.items()}
    torch.save({"model": tensors}, file)
    return tensors


def write_video_model(model: GFDM, folder: Path, *, text: bool) -> None:
    """A diffusers folder as published: no file of this project in it; with `text` the text tower too."""
    model.save_pretrained(folder)
    (folder / "gfdm.json").unlink()
    shutil.rmtree(folder / "text", ignore_errors=True)
    if text:
        model.clip.model.save_pretrained(folder / "text_encoder")
        model.clip.tokenizer.save_pretrained(folder / "tokenizer")


class OpenAICLIP(torch.nn.Module):
    """As large as a test needs, with the structure and names of OpenAI's text tower, and an image tower."""

    def __init__(self, tower: CLIPTextModelWithProjection, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *place, leaf = name.split(".")
            owner: torch.nn.Module = self
            for part in place:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, torch.nn.Parameter(tensor.clone().half()))
        self.visual = torch.nn.Conv2d(3, 4, 2).half()
        self.logit_scale = torch.nn.Parameter(torch.ones([]))
        self.register_buffer("context_length", torch.tensor(tower.config.max_position_embeddings))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x) * self.logit_scale


def small_clip(vocabulary: int = 40) -> CLIPTextModelWithProjection:
    sizes = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=12,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    torch.manual_seed(0)
    return CLIPTextModelWithProjection(sizes).eval()


def manifest_part(reference: Path, begins: str) -> dict[str, list[int]]:
    """Names and shapes of a released checkpoint, from the manifest."""
    parts = json.loads((reference / "checkpoints" / "release_manifest.json").read_text())
    (found,) = [shapes for title, shapes in parts.items() if title.startswith(begins)]
    return found
