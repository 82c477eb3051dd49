"""Training in which one process of two fails alone, for `accelerate launch`: failing.py <folder> <how>."""

import os
import sys
from pathlib import Path

import numpy as np
from engine_toy import Points, toy, trainer

from defi.config import one_line_errors
from defi.engine import run
from defi.engine.loop import train
from defi.engine.model import StageModel
from defi.errors import UserError

VANISHED = 5  # a sample that process 1 wants at step 4


class Vanishing(Points):
    def sample(self, index: int, rng: np.random.Generator) -> dict:
        if index == VANISHED:
            raise FileNotFoundError(2, "No such file or directory", "/data/five.npz")
        return super().sample(index, rng)


class SomeDamaged(Points):
    """Samples 2, 3, 9 and 14 cannot be read."""

    def sample(self, index: int, rng: np.random.Generator) -> dict:
        if index in (2, 3, 9, 14):
            raise UserError(f"clip_{index}.mp4: damaged; copy it again")
        return super().sample(index, rng)


def refuse(*args: object, **settings: object) -> None:
    raise UserError("run: cannot be written to; choose another output=")


def look(model: StageModel, step: int, folder: Path) -> dict[str, float]:
    raise UserError("preview: the main process has no pictures")


def main(folder: Path, how: str) -> None:
    data = {"data": Vanishing, "replaced": SomeDamaged}.get(how, Points)()
    if how == "start" and os.environ["RANK"] == "1":
        data = Points(size=0)
    if how == "folder" and os.environ["RANK"] == "0":
        run.prepare_output = refuse
    settings = trainer(max_steps=500, save_every=1, preview_every=3 if how == "preview" else 0)
    if how == "replaced":
        settings = trainer(max_steps=11, bad_samples=0.6, log_every=4)
    with one_line_errors():
        train(toy(dropout=0.0), data, settings, output=folder, config={"preset_name": "test"}, preview=look)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
