"""What a trained model makes of pairs of frames: codes, errors, features."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from defi.engine.data import readable
from Step2_GIDM.data.mixture import PairMixture
from Step2_GIDM.data.pairs import PairDataset
from Step2_GIDM.data.resize import resize
from Step2_GIDM.model import GIDM
from Step2_GIDM.quantizer import perplexity

BATCH = 32
PICTURE = 112  # pixels a side of the frames that are kept for pictures
POOL = 8  # feature differences are averaged to at most POOL × POOL places


@dataclass
class CodeEvaluation:
    """N pairs spread evenly over a data set, and what the model says of them.

    error: mean square of the predicted later features, per pair. copy_error: the same with the earlier
    frame's features as prediction. shuffled_error: with the latent action of another pair; if it is no larger
    than `error`, the decoder does not read the codes. difference: of the features, X = C · places.
    """

    pairs: Int[np.ndarray, " N"]
    frames: UInt8[Tensor, "N 2 3 H W"]
    indices: Int[Tensor, "N Q"]
    difference: Float[Tensor, "N X"]
    error: Float[Tensor, " N"]
    copy_error: Float[Tensor, " N"]
    shuffled_error: Float[Tensor, " N"]

    def numbers(self, codes: int) -> dict[str, float]:
        """One line of figures. `variety`: distinct tuples of codes, as exp of their entropy."""
        counts = torch.bincount(self.indices.flatten(), minlength=codes)
        tuples = torch.unique(self.indices, dim=0, return_counts=True)[1]
        return {
            "mse": float(self.error.mean()),
            "copy_mse": float(self.copy_error.mean()),
            "shuffled_mse": float(self.shuffled_error.mean()),
            "perplexity": float(perplexity(counts)),
            "dead_codes": float((counts == 0).sum()),
            "variety": float(perplexity(tuples)),
        }


@torch.no_grad()
def evaluate_codes(model: GIDM, data: PairDataset | PairMixture, count: int) -> CodeEvaluation:
    """Run the model in eval mode over at most `count` pairs, at the largest distance."""
    model.eval()
    pairs = np.unique(np.linspace(0, len(data) - 1, count).round().astype(int))
    # In random order, so that the other pair whose latent action is tried is not its neighbour in time.
    pairs = np.random.default_rng(0).permutation(pairs)
    device = next(model.core.parameters()).device
    read = readable(lambda pair: resize(data.frames(pair), data.image_size), pairs.tolist())
    found: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    while batch := list(itertools.islice(read, BATCH)):
        chosen, frames = [pair for pair, _ in batch], torch.stack([frames for _, frames in batch])
        found += chosen
        texts = [clip.text(now) for clip, now in map(data.locate, chosen)]
        small = F.interpolate(frames.flatten(0, 1), PICTURE, mode="bilinear", antialias=True)
        pictures = (small * 255).round().byte().unflatten(0, frames.shape[:2])
        parts.append((pictures, *(t.cpu() for t in _evaluate_batch(model, frames.to(device), texts))))
    return CodeEvaluation(np.array(found), *(torch.cat(part) for part in zip(*parts)))


def _evaluate_batch(model: GIDM, frames: Float[Tensor, "B 2 3 H W"], texts: list[str]) -> tuple[Tensor, ...]:
    patches = model.patches(frames)
    now, later = patches.unbind(1)
    language = model.language(texts)
    actions = model.tokenizer(patches, *language)
    tokens, text = actions.all_tokens(), (actions.text, *language[1:])
    own, other = (model.core.decoder(now, given, *text) for given in (tokens, tokens.roll(1, dims=0)))
    errors = [(guess - later).square().mean((1, 2)) for guess in (own, now, other)]
    grid = (later - now).transpose(1, 2).unflatten(2, (model.dino.grid, model.dino.grid))
    pooled = F.adaptive_avg_pool2d(grid, min(POOL, model.dino.grid))
    return actions.indices, pooled.flatten(1), *errors
