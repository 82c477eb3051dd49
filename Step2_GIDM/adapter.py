"""Published GIDM checkpoints, to and from ours.

A Lightning file (`lam_idm.ckpt`): under `state_dict` the latent action model as `lam.*`, in it DINOv2 under
torch.hub's names (`lam.dino_encoder.*`) and T5 (`lam.text_encoder.*`). UniVLA's controllable model, which has
no text, is read with gidm.variant=controllable.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from omegaconf import DictConfig
from torch import Tensor

from defi.checkpoints.account import Report, account, shapes
from defi.checkpoints.foreign import read_foreign
from defi.checkpoints.names import join, split
from defi.errors import UserError
from defi.text import T5Text
from Step2_GIDM.dino import DinoPatches
from Step2_GIDM.dino_hub import hub_image_size, hub_names
from Step2_GIDM.model import GIDM, GIDMConfig
from Step2_GIDM.published import copy_published, model_names, to_published

TITLE = "published GIDM (Lightning)"
MARK = "lam.patch_up.weight"
CORE, DINO, T5 = "lam.", "lam.dino_encoder.", "lam.text_encoder."


def recognises(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a published GIDM."""
    return MARK in names


def build(cfg: DictConfig) -> GIDM:
    """The model of a preset, new."""
    return GIDM(GIDMConfig.from_preset(cfg))


def publish(model: GIDM) -> dict[str, Tensor]:
    """The trained part under the published names."""
    return {
        CORE + name: tensor for name, tensor in to_published(model.core.state_dict(), _core(model)).items()
    }


def publish_towers(model: GIDM) -> dict[str, Tensor]:
    """The frozen encoders that a published file holds besides."""
    dino = join(model.dino.model.state_dict(), hub_names(model.dino.model))
    towers = {DINO + name: tensor for name, tensor in dino.items()}
    if model.config.variant == "language":
        towers |= {T5 + name: tensor for name, tensor in model.text.model.state_dict().items()}
    return towers


def adopt(model: GIDM, tensors: Mapping[str, Tensor], *, source: object) -> Report:
    """Load a published checkpoint into `model`, encoders included.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    expected = shapes(publish(model) | publish_towers(model))
    report = account(tensors, expected, source=source).demand()
    dino, text = _below(tensors, DINO), _below(tensors, T5)
    core = {n: t for n, t in _below(tensors, CORE).items() if not (CORE + n).startswith((DINO, T5))}
    copy_published(model.core, core, _core(model))
    model.dino.model.load_state_dict(split(dino, hub_names(model.dino.model)))
    if text:
        model.text.model.load_state_dict(text)
    return report


def convert(cfg: DictConfig) -> tuple[GIDM, Report]:
    """The GIDM in the file `cfg.source`, at the sizes of a preset; its encoders are saved with it.

    T5's tokenizer, which the file does not hold, comes from `text.t5.pretrained`.
    """
    tensors = read_foreign(cfg.source)
    if not recognises(tensors):
        raise UserError(
            f"{cfg.source}: no published GIDM (no {MARK}); give its checkpoint, or another stage="
        )
    config = GIDMConfig.from_preset(cfg)
    own = replace(
        config,
        dino=replace(config.dino, pretrained=None),
        text=replace(config.text, pretrained=None),
    )
    positions = hub_image_size(_below(tensors, DINO), own.dino, source=cfg.source)
    dino = DinoPatches.random(own.dino, positions=positions)
    model = GIDM(own, dino=dino, text=T5Text.from_config(config.text))
    return model, adopt(model, tensors, source=cfg.source)


def _core(model: GIDM) -> dict[str, tuple[str, ...]]:
    return model_names(model.tokenizer.sizes, decoder_blocks=model.config.decoder_blocks)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
