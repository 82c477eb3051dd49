"""Transfer of latent actions: with a model that reads motion exactly, actions lead the same way elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from made_data import MadeData

from Step2_GIDM.code_evaluation import transfer
from Step2_GIDM.data.pairs import PairDataset
from Step2_GIDM.gallery import draw_transfer

SIDE = 56
DIRECTIONS = ((2, 0), (-2, 0), (0, 2), (0, -2))


def squares(episode: int, positions: Sequence[int]) -> np.ndarray:
    """A square that moves through the middle of the picture in one of four directions."""
    frames = np.full((len(positions), SIDE, SIDE, 3), 60, np.uint8)
    dx, dy = DIRECTIONS[episode % 4]
    for frame, position in zip(frames, positions):
        x, y = 22 + dx * (position - 6), 22 + dy * (position - 6)
        frame[y : y + 12, x : x + 12] = np.arange(12)[:, None, None] * 10 + 130
    return frames


class Exact(torch.nn.Module):
    """Stands for a GIDM: features are the square's place, an action is its displacement."""

    def __init__(self, *, meaning: float) -> None:
        super().__init__()
        self.core = torch.nn.Linear(1, 1)
        self.core.decoder = lambda now, tokens, text, mask=None: now + meaning * tokens
        self.tokenizer = lambda patches: SimpleNamespace(
            all_tokens=lambda: patches[:, 1] - patches[:, 0], text=None
        )

    def language(self, texts: list[str]) -> tuple:
        return ()

    def dino(self, frames: torch.Tensor) -> torch.Tensor:
        there = (frames.mean(1) > 0.4).float()
        grid = torch.arange(SIDE, dtype=torch.float32)
        total = there.sum((1, 2)).clamp(min=1)
        x, y = (there * grid).sum((1, 2)) / total, (there * grid[:, None]).sum((1, 2)) / total
        return torch.stack([x, y], dim=1)[:, None]

    def patches(self, frames: torch.Tensor) -> torch.Tensor:
        return self.dino(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def test_actions_that_mean_motion_go_the_same_way_elsewhere(tmp_path: Path) -> None:
    data = PairDataset(MadeData([13] * 8, squares), ["front"], image_size=SIDE, distance=(4, 4))
    right, wrong = (transfer(Exact(meaning=meaning), data) for meaning in (1.0, -1.0))
    assert right.given.shape[1:] == (2, 3, 112, 112) and right.reached.shape[1:] == (8, 2, 3, 112, 112)
    assert right.same_direction() > 0.8 and wrong.same_direction() < -0.5
    draw_transfer(right, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").read_bytes()[:4] == b"\x89PNG"
    still = transfer(Exact(meaning=0.0), data)
    assert still.same_direction() is None, "nothing moves"
