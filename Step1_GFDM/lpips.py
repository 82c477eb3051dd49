"""LPIPS: how different two pictures look to a network (Zhang et al. 2018, AlexNet, version 0.1).

Its weights are two published files, which are not downloaded here: torchvision's AlexNet, and the linear
weights of the authors' repository (richzhang/PerceptualSimilarity, `lpips/weights/v0.1/alex.pth`).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import alexnet

from defi.checkpoints.files import read_foreign
from defi.engine.weights import load_strict

BACKBONE, LINEAR = "alexnet-owt-7be5be79.pth", "alex.pth"
WIDTHS = (64, 192, 384, 256, 256)
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's pixels in [-1, 1]


class LPIPS(nn.Module):
    """Weighted squared distances of AlexNet's five activations, each of unit length over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = alexnet().features[:-1]  # less the pooling at the end
        self.weights = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in WIDTHS)
        self.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path | str) -> "LPIPS":
        """With the two published files, under their published names.

        Raises:
            UserError: one is missing, damaged, or holds other tensors.
        """
        model, folder = cls(), Path(folder)
        published = read_foreign(folder / BACKBONE)
        used = {name: tensor for name, tensor in published.items() if not name.startswith("classifier.")}
        layers = {f"features.{name}": tensor for name, tensor in model.layers.state_dict().items()}
        load_strict(layers, used, source=folder / BACKBONE)
        linear = {f"lin{level}.model.1.weight": weight for level, weight in enumerate(model.weights)}
        load_strict(linear, read_foreign(folder / LINEAR), source=folder / LINEAR)
        return model

    def forward(self, a: Float[Tensor, "F 3 H W"], b: Float[Tensor, "F 3 H W"]) -> Float[Tensor, " F"]:
        """Distance of images in [-1, 1], of at least 32 pixels; 0: the same."""
        pairs = zip(self.weights, self.activations(a), self.activations(b))
        return sum((weight * (x - y).square()).sum(1).mean((1, 2)) for weight, x, y in pairs)

    def activations(self, images: Float[Tensor, "F 3 H W"]) -> list[Float[Tensor, "F C h w"]]:
        """Outputs of the five rectifiers, each of unit length over its channels."""
        x = (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(DEVIATION)[:, None, None]
        found = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(F.normalize(x, dim=1))
        return found
