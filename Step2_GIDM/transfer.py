"""Does a latent action mean the same elsewhere? The action of one pair, applied to a frame of another clip.

The decoder predicts features, not pixels: shown is the frame of that clip whose features come closest.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from defi.engine.output import write_file
from Step2_GIDM.code_evaluation import PICTURE
from Step2_GIDM.data.pairs import PairDataset
from Step2_GIDM.data.resize import resize
from Step2_GIDM.flow import displacement, mean_displacement
from Step2_GIDM.gallery import overlay
from Step2_GIDM.model import GIDM

STARTS, ACTIONS = 8, 12  # clips that actions are applied in, and actions, each from a clip of its own
CANDIDATES = 24  # frames of a clip that a prediction may turn out to be
MOVES = 0.005  # displacement, as a share of the side, from which a pair counts as moving


@dataclass
class Transfer:
    """`ACTIONS` pairs A applied to `STARTS` frames B.

    given: the pairs the actions were read from. reached: frame B and the one the action is taken to lead to.
    """

    given: Float[Tensor, "A 2 3 H W"]
    reached: Float[Tensor, "A S 2 3 H W"]

    def same_direction(self) -> float | None:
        """Mean cosine between the motion in A and in B, over those that move; None if nothing does.

        1: always the same way. 0: no relation.
        """
        a = mean_displacement(*displacement(self.given))[:, None].expand(-1, self.reached.shape[1], -1)
        b = mean_displacement(*displacement(self.reached.flatten(0, 1))).unflatten(0, self.reached.shape[:2])
        both_move = (a.norm(dim=-1) > MOVES) & (b.norm(dim=-1) > MOVES)
        return float(F.cosine_similarity(a, b, dim=-1)[both_move].mean()) if both_move.any() else None


@torch.no_grad()
def transfer(model: GIDM, data: PairDataset) -> Transfer:
    """Actions of pairs spread over the data, at the largest distance, applied to frames of other clips."""
    model.eval()
    device = next(model.core.parameters()).device
    # Not the last pair of all, whose two frames are the same one.
    pairs = np.unique(((np.arange(ACTIONS) + 0.5) / ACTIONS * len(data)).astype(int))
    frames = torch.stack([resize(data.frames(int(pair)), data.image_size) for pair in pairs])
    texts = [clip.text(now) for clip, now in map(data.locate, pairs.tolist())]
    language = model.language(texts)
    actions = model.tokenizer(model.patches(frames.to(device)), *language)
    tokens, text = actions.all_tokens(), (actions.text, *language[1:])
    reached = []
    long = (data.source.lengths > 1).nonzero()[0].tolist()
    for number in np.unique(np.linspace(0, len(long) - 1, STARTS).round().astype(int)):
        clip = data.source.clip(long[number])
        positions = np.unique(np.linspace(0, clip.length - 1, CANDIDATES).round().astype(int)).tolist()
        pixels = torch.from_numpy(data.source.read(clip, positions)).permute(0, 3, 1, 2)
        candidates = resize(pixels, data.image_size)
        patches = model.dino(candidates.to(device))
        middle = len(positions) // 2  # a start from which the clip goes both ways
        start = patches[middle : middle + 1].expand(len(pairs), -1, -1)
        predicted = model.core.decoder(start, tokens, *text)
        errors = (predicted[:, None] - patches[None]).square().mean((2, 3))
        closest = candidates[errors.argmin(1).cpu()]
        reached.append(torch.stack([candidates[middle].expand_as(closest), closest], dim=1))
    return Transfer(_small(frames), _small(torch.stack(reached, dim=1)))


def _small(frames: Float[Tensor, "*N 3 H W"]) -> Float[Tensor, "*N 3 h w"]:
    pictures = F.interpolate(frames.flatten(0, -4), PICTURE, mode="bilinear", antialias=True)
    return pictures.unflatten(0, frames.shape[:-3])


def draw_transfer(found: Transfer, path: Path, *, rows: int = 6, columns: int = 4) -> None:
    """A row per action: the pair it was read from, then where it leads from other clips' frames."""
    rows, columns = min(rows, len(found.given)), min(columns, found.reached.shape[1])
    figure, axes = plt.subplots(
        rows, columns + 1, figsize=(1.7 * (columns + 1), 1.8 * rows), squeeze=False, layout="constrained"
    )
    title = "Red: before, cyan: after. Left: the pair an action is read from; right: applied to other clips."
    figure.suptitle(title, fontsize=8)
    for row, given, reached in zip(axes, found.given, found.reached):
        for axis, pair in zip(row, [given, *reached]):
            axis.imshow(overlay(pair))
            axis.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_file(path, buffer.getvalue())
