"""GIDM: the inverse dynamics model as the training engine sees it (pixels and strings in, loss out).

Paper section "General Inverse Dynamics Model": frozen DINOv2 patches of two frames, frozen T5 text, a latent
action tokenizer and a decoder that predicts the later frame's patches. Actions of a robot are never used.
"""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from defi.config import typed
from defi.engine.model import CONFIG, StageModel
from defi.errors import UserError, reading
from defi.files import check_sizes, read_json
from defi.text import T5Text, TextConfig
from Step2_GIDM.blocks import SpatialBlock, SpatioTemporalBlock
from Step2_GIDM.dino import DinoConfig, DinoPatches
from Step2_GIDM.initial import use_codes_early
from Step2_GIDM.latent_action import (
    LatentActionModel,
    LatentActions,
    LatentActionSizes,
    LatentActionTokenizer,
)
from Step2_GIDM.quantizer import perplexity

CHOICES = {
    "variant": ("language", "controllable"),
    "initial": ("default", "early_codes"),
    "restart_from": ("vectors", "codes"),
}

PUNCTUATION = re.compile(f"[{re.escape(string.punctuation.replace(chr(92), ''))}]")
"""What is left out of instructions. The published pattern forgets the backslash, which therefore stays."""


def plain(text: str) -> str:
    """Lower case, without punctuation: how instructions reach T5 in this stage. Blanks stay as they are."""
    return PUNCTUATION.sub("", text.lower())


@dataclass
class GIDMConfig:
    """Sizes of the model; the defaults are the paper's.

    variant: `language` (text beside the frames), or `controllable` (no text; a second set of queries and
        codes beside those of a first-stage model, whose codebook of `frozen_codes` stays as it is; training
        reads that number from the first stage).
    commitment: weight β of the commitment loss.
    restart_pairs: codes that so many pairs did not use are restarted; null: those that an epoch did not use.
    restart_from: as recent `vectors` of the encoder, or as copies of other `codes` (published).
    initial: `default`, PyTorch's weights (published), or `early_codes` (`Step2_GIDM.initial`).
    mixed_text_masks: in training a row sees the text mask of another sample (published, a fault).
    """

    variant: str = "language"
    width: int = 768
    encoder_blocks: int = 12
    decoder_blocks: int = 12
    heads: int = 12
    queries: int = 4
    codes: int = 16
    code_width: int = 128
    frozen_codes: int = 16
    commitment: float = 0.25
    restart_pairs: int | None = None
    restart_from: str = "vectors"
    initial: str = "default"
    mixed_text_masks: bool = False
    dino: DinoConfig = field(default_factory=DinoConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"gidm.{name}={value}: choose one of {', '.join(choices)}")
        if self.width % self.heads:
            raise UserError(f"gidm.width={self.width}: not a multiple of gidm.heads={self.heads}")

    @classmethod
    def from_preset(cls, cfg: Mapping[str, Any]) -> "GIDMConfig":
        """From a composed configuration: its sections `gidm` and `text.t5`."""
        return typed(cls, {**cfg["gidm"], "text": cfg["text"]["t5"]}, "gidm")

    def fake_batch(self, batch_size: int) -> dict[str, Any]:
        """Valid input of `GIDM.forward`, drawn at random."""
        side = self.dino.image_size
        texts = ["open the drawer", "push the red block to the left", ""] * batch_size
        return {"frames": torch.rand(batch_size, 2, 3, side, side), "text": texts[:batch_size]}


class GIDM(StageModel):
    """Two frames and a text → latent actions, learned by predicting the later frame's features."""

    stage: ClassVar[str] = "gidm"
    config_class: ClassVar[type] = GIDMConfig
    frozen: ClassVar[tuple[str, ...]] = ("dino", "text")
    blocks: ClassVar[tuple[type[nn.Module], ...]] = (SpatialBlock, SpatioTemporalBlock)
    config: GIDMConfig

    def __init__(
        self, config: GIDMConfig, *, dino: DinoPatches | None = None, text: T5Text | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.dino = dino or DinoPatches.from_config(config.dino)
        self.text = text or T5Text.from_config(config.text)
        language = config.variant == "language"
        sizes = LatentActionSizes(
            patch_width=self.dino.width,
            text_width=self.text.width if language else None,
            width=config.width,
            blocks=config.encoder_blocks,
            heads=config.heads,
            queries=config.queries,
            codes=config.codes,
            code_width=config.code_width,
            frozen_codes=None if language else config.frozen_codes,
        )
        blocks, commitment = config.decoder_blocks, config.commitment
        self.core = LatentActionModel(sizes, decoder_blocks=blocks, commitment=commitment)
        self.tokenizer.encoder.mixed_text_masks = config.mixed_text_masks
        if config.initial == "early_codes":
            use_codes_early(self.core)
        self.freeze()

    @property
    def tokenizer(self) -> LatentActionTokenizer:
        """What stage 3 takes over."""
        return self.core.tokenizer

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss and health of the codes.

        Args:
            batch: `frames` [B, 2, 3, H, W], now and later, in [0, 1]; `text`, B strings ("" if unknown).
        """
        out = self.core(self.patches(batch["frames"]), *self.language(batch["text"]))
        codes, quantizer = out.actions.codes, self.tokenizer.quantizer
        return {
            "loss": out.loss,
            "mse": out.mse.detach(),
            "codebook": codes.codebook_loss.detach(),
            "commitment": codes.commitment_loss.detach(),
            "perplexity": perplexity(codes.counts),
            "code_usage": (codes.counts > 0).float().mean(),
            "dead_codes": (quantizer.usage == 0).sum().float(),
        }

    def patches(self, frames: Float[Tensor, "B 2 3 H W"]) -> Float[Tensor, "B 2 L C"]:
        """DINO's patch tokens of both frames."""
        return self.dino(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def encode(self, patches: Float[Tensor, "B 2 L C"], texts: list[str]) -> LatentActions:
        """Latent actions only, without the decoder: `indices` [B, Q] name the motion between two frames."""
        return self.tokenizer(patches, *self.language(texts))

    def language(self, texts: list[str]) -> tuple[Tensor, Tensor] | tuple[()]:
        """States and mask of the instructions; nothing in the variant without language."""
        if self.config.variant != "language":
            return ()
        together = self.training and self.config.mixed_text_masks
        return self.text([plain(text) for text in texts], together=together)

    def step_end(self) -> None:
        """Restart the codes that the latest `restart_pairs` pairs, of all processes, did not use."""
        period, quantizer = self.config.restart_pairs, self.tokenizer.quantizer
        if period is not None and int(quantizer.usage.sum()) >= period * self.config.queries:
            quantizer.restart_unused(self.config.restart_from)

    def epoch_end(self) -> dict[str, float]:
        """Restart the codes that no pair of the epoch used, unless `restart_pairs` sets another period."""
        if self.config.restart_pairs is not None:
            return {}
        quantizer = self.tokenizer.quantizer
        health = {"epoch_perplexity": float(perplexity(quantizer.usage))}
        return health | {"restarted_codes": float(quantizer.restart_unused(self.config.restart_from))}

    @torch.no_grad()
    def adopt_first_stage(self, first: "GIDM") -> None:
        """Controllable variant: take over queries and codebook of a `language` model with `frozen_codes`."""
        self.tokenizer.frozen_quantizer.codebook.copy_(first.tokenizer.quantizer.codebook)
        self.tokenizer.encoder.queries[1].copy_(first.tokenizer.encoder.queries[0])

    def save_pretrained(self, folder: Path) -> None:
        """Weights and config; encoders drawn at random go beside them, pretrained ones are loaded by name."""
        super().save_pretrained(folder)
        if not self.config.dino.pretrained:
            self.dino.model.save_pretrained(folder / "dino")
        if not self.config.text.pretrained:
            self.text.save(folder / "t5")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "GIDM":
        """The model that `save_pretrained` wrote."""
        file = folder / CONFIG
        values = read_json(file, "copy the checkpoint folder as a whole")
        check_sizes(values, file)
        config = typed(cls.config_class, values, str(file))
        dino, text = config.dino, config.text
        own = dino if dino.pretrained else replace(dino, pretrained=str(folder / "dino"))
        with reading(file, "copy the checkpoint again"):
            model = cls(
                config,
                dino=DinoPatches.from_config(own),
                text=None if text.pretrained else T5Text.load(folder / "t5", text),
            )
        model.load_weights(folder)
        return model
