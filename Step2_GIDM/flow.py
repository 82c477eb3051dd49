"""Displacement between two frames by block matching: coarse, but needs no weights and no training."""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SIDE = 56  # pixels at which blocks are compared
BLOCK, STRIDE, REACH = 8, 4, 9  # block size, distance between blocks, furthest displacement searched
GRID = (SIDE - BLOCK) // STRIDE + 1


def displacement(
    frames: Float[Tensor, "N 2 3 H W"],
) -> tuple[Float[Tensor, "N 2 G G"], Float[Tensor, "N G G"]]:
    """Where each block of the earlier frame is in the later one.

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
