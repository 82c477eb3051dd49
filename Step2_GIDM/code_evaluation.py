"""What a trained model makes of pairs of frames: codes, errors, features; and of its actions elsewhere."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from defi.data.mixture import Mixture
from defi.engine.data import readable
from Step2_GIDM.data.images import resize
from Step2_GIDM.data.pairs import PairDataset
from Step2_GIDM.model import GIDM
from Step2_GIDM.quantizer import perplexity

BATCH = 32
PICTURE = 112  # pixels a side of the frames that are kept for pictures
POOL = 8  # feature differences are averaged to at most POOL × POOL places

STARTS, ACTIONS = 8, 12  # clips that actions are applied in, and actions, each from a clip of its own
CANDIDATES = 24  # frames of a clip that a prediction may turn out to be
MOVES = 0.005  # displacement, as a share of the side, from which a pair counts as moving

# Displacement by block matching.
SIDE = 56  # pixels at which blocks are compared
BLOCK, STRIDE, REACH = 8, 4, 9  # block size, distance between blocks, furthest displacement searched
CENTRES = (torch.arange(0, SIDE - BLOCK + 1, STRIDE) + BLOCK / 2) / SIDE  # of the G blocks of a line


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


def evenly(count: int, length: int) -> list[int]:
    """At most `count` of the numbers below `length`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, length - 1, count).round().astype(int)).tolist()


def small(frames: Float[Tensor, "*N 3 H W"]) -> Float[Tensor, "*N 3 h w"]:
    """For pictures."""
    pictures = F.interpolate(frames.flatten(0, -4), PICTURE, mode="bilinear", antialias=True)
    return pictures.unflatten(0, frames.shape[:-3])


@torch.no_grad()
def evaluate_codes(model: GIDM, data: PairDataset | Mixture[PairDataset], count: int) -> CodeEvaluation:
    """Run the model in eval mode over at most `count` pairs, at the largest distance."""
    device = next(model.eval().core.parameters()).device
    # In random order, so that the other pair whose latent action is tried is not its neighbour in time.
    samples = readable(data.sample, np.random.default_rng(0).permutation(evenly(count, len(data))).tolist())
    pairs: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    while batch := list(itertools.islice(samples, BATCH)):
        pairs += [pair for pair, _ in batch]
        frames = torch.stack([sample["frames"] for _, sample in batch])
        patches = model.patches(frames.to(device))
        now, later = patches.unbind(1)
        language = model.language([sample["text"] for _, sample in batch])
        actions = model.tokenizer(patches, *language)
        tokens, text = actions.all_tokens(), (actions.text, *language[1:])
        own, other = (model.core.decoder(now, given, *text) for given in (tokens, tokens.roll(1, dims=0)))
        errors = [(guess - later).square().mean((1, 2)) for guess in (own, now, other)]
        grid = (later - now).transpose(1, 2).unflatten(2, (model.dino.grid, model.dino.grid))
        difference = F.adaptive_avg_pool2d(grid, min(POOL, model.dino.grid)).flatten(1)
        pictures = (small(frames) * 255).round().byte()
        parts.append((pictures, *(tensor.cpu() for tensor in (actions.indices, difference, *errors))))
    return CodeEvaluation(np.array(pairs), *(torch.cat(part) for part in zip(*parts)))


def displacement(
    frames: Float[Tensor, "N 2 3 H W"],
) -> tuple[Float[Tensor, "N 2 G G"], Float[Tensor, "N G G"]]:
    """Where each block of the earlier frame is in the later one: coarse, but without weights or training.

    Returns:
        (dx, dy) of every block as a share of the picture's side, x to the right, y downwards; and its weight:
        how much the block changed (0 for a still background, so that weighted means speak of what moved).
    """
    grey = F.interpolate(frames.mean(dim=2), size=(SIDE, SIDE), mode="area")
    now, later = grey[:, :1], F.pad(grey[:, 1:], [REACH] * 4, mode="replicate")
    costs = []
    moves = [(dx, dy) for dy, dx in itertools.product(range(-REACH, REACH + 1), repeat=2)]
    for dx, dy in moves:
        shifted = later[:, :, REACH + dy : REACH + dy + SIDE, REACH + dx : REACH + dx + SIDE]
        cost = F.avg_pool2d((shifted - now).abs(), BLOCK, STRIDE)[:, 0]
        # A small price of distance: among equally good matches (plain surfaces) the nearest wins.
        costs.append(cost + 0.001 * (dx * dx + dy * dy) ** 0.5)
    best = torch.stack(costs).argmin(0)
    move = torch.tensor(moves, dtype=frames.dtype, device=frames.device)[best].permute(0, 3, 1, 2) / SIDE
    change = costs[moves.index((0, 0))]
    weight = torch.where(change > 0.02, change, 0) * (move.abs().sum(1) > 0)
    return move, weight


def mean_displacement(move: Float[Tensor, "N 2 G G"], weight: Float[Tensor, "N G G"]) -> Float[Tensor, "N 2"]:
    """One (dx, dy) per pair: the mean over blocks, each by how much it changed; 0 where nothing did."""
    return (move * weight[:, None]).sum((2, 3)) / weight.sum((1, 2)).clamp(min=1e-6)[:, None]


@dataclass
class Transfer:
    """`ACTIONS` pairs A applied to `STARTS` frames B: does a latent action mean the same elsewhere?

    given: the pairs the actions were read from. reached: frame B and the one the action is taken to lead to.
    The decoder predicts features, not pixels: that is the frame of B's clip whose features come closest.
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
    device = next(model.eval().core.parameters()).device
    # Not the last pair of all, whose two frames are the same one.
    pairs = np.unique(((np.arange(ACTIONS) + 0.5) / ACTIONS * len(data)).astype(int)).tolist()
    samples = [data.sample(pair) for pair in pairs]
    frames = torch.stack([sample["frames"] for sample in samples])
    language = model.language([sample["text"] for sample in samples])
    actions = model.tokenizer(model.patches(frames.to(device)), *language)
    tokens, text = actions.all_tokens(), (actions.text, *language[1:])
    reached = []
    long = (data.lengths > 1).nonzero()[0].tolist()
    for number in evenly(STARTS, len(long)):
        episode, camera = data.clip(long[number])
        positions = evenly(CANDIDATES, episode.length)
        candidates = resize(data.read(episode, camera, positions), data.image_size)
        patches = model.dino(candidates.to(device))
        middle = len(positions) // 2  # a start from which the clip goes both ways
        start = patches[middle : middle + 1].expand(len(pairs), -1, -1)
        predicted = model.core.decoder(start, tokens, *text)
        errors = (predicted[:, None] - patches[None]).square().mean((2, 3))
        closest = candidates[errors.argmin(1).cpu()]
        reached.append(torch.stack([candidates[middle].expand_as(closest), closest], dim=1))
    return Transfer(small(frames), small(torch.stack(reached, dim=1)))
