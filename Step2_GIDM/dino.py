"""Frozen DINOv2 with registers: two frames become patch tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from defi.errors import UserError
from defi.hub import load_model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class DinoConfig:
    """The frozen image encoder. With `pretrained` (folder or hub name) only `image_size` is read besides it.

    image_size: side of the square input in pixels, a multiple of the patch (14).
    width, layers, heads, seed: of the random tower that stands in where nothing is downloaded.
    """

    pretrained: str | None = None
    image_size: int = 224
    width: int = 768
    layers: int = 12
    heads: int = 12
    patch: int = 14
    registers: int = 4
    seed: int = 0


class DinoPatches(nn.Module):
    """Pixels in [0, 1] → patch tokens after the final LayerNorm, without class and register tokens."""

    def __init__(self, model: Dinov2WithRegistersModel, image_size: int) -> None:
        super().__init__()
        patch = model.config.patch_size
        if image_size % patch:
            raise UserError(f"gidm.dino.image_size={image_size}: not a multiple of the {patch}-pixel patch")
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        # Buffers: torchvision's normalize would look at its numbers on the GPU in every call.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    @classmethod
    def from_config(cls, config: DinoConfig, *, positions: int | None = None) -> "DinoPatches":
        """The pretrained encoder the config names, or the random one it describes.

        positions: side, in pixels, of the images that the random one's position embeddings are for.
        """
        if config.pretrained:
            return cls(load_model(Dinov2WithRegistersModel, config.pretrained), config.image_size)
        sizes = Dinov2WithRegistersConfig(
            image_size=positions or config.image_size,
            patch_size=config.patch,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_register_tokens=config.registers,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return cls(Dinov2WithRegistersModel(sizes), config.image_size)

    @property
    def width(self) -> int:
        """C, the width of the patch tokens."""
        return self.model.config.hidden_size

    @property
    def grid(self) -> int:
        """Patches along one side; L is its square."""
        return self.image_size // self.model.config.patch_size

    @torch.no_grad()
    def forward(self, frames: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L C"]:
        pixels = (frames - self.mean) / self.deviation
        tokens = self.model(pixel_values=pixels).last_hidden_state
        return tokens[:, 1 + self.model.config.num_register_tokens :]
