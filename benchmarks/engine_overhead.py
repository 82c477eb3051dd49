"""The training engine against a loop written by hand: `python -m benchmarks.engine_overhead [--steps 40]`.

Trains the smallest GIDM (preset=tiny) by turns with `defi.engine.loop.train` and ten lines of PyTorch that
do the same arithmetic, on made-up pairs. Seconds per step are those of a long run less those of a short one,
which leaves out the start; also in processor time, which other work on the machine disturbs less.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from defi.config import compose_preset
from defi.engine.config import TrainerConfig
from defi.engine.loop import train
from Step2_GIDM.model import GIDM, GIDMConfig

BATCH, SHORT = 16, 5  # samples per step; steps of the short run


class MadeUpPairs(Dataset):
    """The same made-up pairs again and again, from memory."""

    def __init__(self, config: GIDMConfig) -> None:
        torch.manual_seed(0)
        self.config = config
        self.batch = config.fake_batch(4 * BATCH)

    def __len__(self) -> int:
        return len(self.batch["text"])

    def __getitem__(self, index: int) -> dict:
        return {name: values[index] for name, values in self.batch.items()} | {"seed": index}


def by_hand(model: GIDM, pairs: MadeUpPairs, steps: int) -> None:
    optimizer = AdamW([p for _, p in model.trainable()], lr=1e-4, fused=True)
    model.train()
    batches = (batch for _ in range(steps) for batch in DataLoader(pairs, BATCH, shuffle=True))
    for batch in islice(batches, steps):
        loss = model(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def by_engine(model: GIDM, pairs: MadeUpPairs, steps: int) -> None:
    trainer = TrainerConfig(global_batch=BATCH, max_steps=steps, lr=1e-4, log_every=10, save_every=0)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        train(model, pairs, trainer, output=Path(folder) / "run", config={"preset_name": "tiny"})


def per_step(loop: Callable[[GIDM, MadeUpPairs, int], None], pairs: MadeUpPairs, steps: int) -> np.ndarray:
    """Seconds of a step: by the clock, and of the processor."""
    taken = []
    for count in (SHORT, SHORT + steps):
        torch.manual_seed(0)
        model = GIDM(pairs.config)
        start = np.array([time.perf_counter(), time.process_time()])
        loop(model, pairs, count)
        taken.append(np.array([time.perf_counter(), time.process_time()]) - start)
    return (taken[1] - taken[0]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pairs = MadeUpPairs(GIDMConfig.from_preset(compose_preset("tiny")))
    by_hand(GIDM(pairs.config), pairs, 2)  # what is done once in a process
    rounds = [
        [per_step(loop, pairs, options.steps) for loop in (by_hand, by_engine)] for _ in range(options.rounds)
    ]
    seconds = np.median(rounds, axis=0)
    for name, (clock, processor) in zip(("by hand", "engine"), seconds):
        print(f"{name:8} {1e3 * clock:8.2f} ms per step, {1e3 * processor:8.2f} ms of the processor")
    more = seconds[1] / seconds[0] - 1
    print(f"the engine takes {more[0]:+.1%} by the clock, {more[1]:+.1%} of the processor")


if __name__ == "__main__":
    main()
