"""A small model and data set for the engine's tests."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from defi.engine.config import TrainerConfig
from defi.engine.data import SampleNoise
from defi.engine.model import StageModel


@dataclass
class ToyConfig:
    width: int = 8
    dropout: float = 0.2


class Toy(StageModel):
    """Denoises vectors. Has what the stages have: a frozen network, dropout, noise, a buffer that counts."""

    stage = "gidm"
    config_class = ToyConfig
    frozen = ("teacher",)
    blocks = (nn.Linear,)

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.teacher = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        self.net = nn.Sequential(
            nn.Linear(3, config.width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(config.width, 3)
        )
        self.register_buffer("epochs_seen", torch.zeros(()))
        self.freeze()

    def forward(self, batch: dict) -> dict[str, Tensor]:
        x = batch["x"]
        noise = SampleNoise(batch["seed"], x.device).normal("x", 3)
        error = (self.net(x + noise) - x).square().mean()
        return {"loss": error, "level": x.mean()}

    def epoch_end(self) -> dict[str, float]:
        self.epochs_seen += 1
        return {"seen": self.epochs_seen.item()}


class Points(Dataset):
    """Seeded points near a line, jittered anew in every epoch."""

    fingerprint = "points"

    def __init__(self, size: int = 22) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, rng: np.random.Generator) -> dict:
        return {"x": torch.tensor([index, 1.0, rng.normal()]) / self.size, "text": f"point {index}"}


def toy(**config: float) -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig(**config))


def trainer(**changes: object) -> TrainerConfig:
    settings = {
        "global_batch": 4, "max_steps": 10, "lr": 1e-2, "log_every": 1, "save_every": 0, "ema": 0.9,
        "schedule": "constant", "workers": 0,
    }  # fmt: skip
    return TrainerConfig(**{**settings, **changes})
