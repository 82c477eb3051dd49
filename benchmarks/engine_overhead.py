"""The training engine against a loop written by hand: `python -m benchmarks.engine_overhead [--steps 40]`.

Trains the smallest GIDM (preset=tiny) by turns with `defi.engine.loop.train` and ten lines of PyTorch that
do the same arithmetic, on made-up pairs, and compares the seconds per step.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from defi.config import compose_preset
from defi.engine.config import TrainerConfig
from defi.engine.loop import train
from defi.engine.tracking import METRICS, read_metrics
from Step2_GIDM.model import GIDM, GIDMConfig

BATCH, EVERY, FIRST = 16, 5, 2  # samples per step; steps per measurement; measurements that do not count


class MadeUpPairs(Dataset):
    """The same made-up pairs again and again, from memory."""

    def __init__(self, config: GIDMConfig) -> None:
        torch.manual_seed(0)
        self.batch = config.fake_batch(4 * BATCH)

    def __len__(self) -> int:
        return len(self.batch["text"])

    def __getitem__(self, index: int) -> dict:
        return {name: values[index] for name, values in self.batch.items()} | {"seed": index}


def by_hand(model: GIDM, pairs: MadeUpPairs, steps: int) -> list[float]:
    """Seconds per step, over every `EVERY` steps."""
    optimizer = AdamW([p for _, p in model.trainable()], lr=1e-4, fused=True)
    model.train()
    seconds, done = [], 0
    start = time.perf_counter()
    while done < steps:
        for batch in DataLoader(pairs, BATCH, shuffle=True):
            loss = model(batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done % EVERY == 0:
                loss.item()
                seconds.append((time.perf_counter() - start) / EVERY)
                start = time.perf_counter()
    return seconds[FIRST:]


def by_engine(model: GIDM, pairs: MadeUpPairs, steps: int) -> list[float]:
    """The same, from the log of a run."""
    trainer = TrainerConfig(global_batch=BATCH, max_steps=steps, lr=1e-4, log_every=EVERY, save_every=0)
    with tempfile.TemporaryDirectory() as folder:
        train(model, pairs, trainer, output=Path(folder) / "run", config={"preset_name": "tiny"})
        records = read_metrics(Path(folder) / "run" / METRICS)
    return [BATCH / record["samples_per_s"] for record in records if record["kind"] == "train"][FIRST:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = GIDMConfig.from_preset(compose_preset("tiny"))
    pairs = MadeUpPairs(config)
    seconds: dict[str, list[float]] = {"by hand": [], "engine": []}
    for _ in range(options.rounds):
        for name, run in (("by hand", by_hand), ("engine", by_engine)):
            torch.manual_seed(0)
            seconds[name] += run(GIDM(config), pairs, options.steps)
    for name, found in seconds.items():
        median, low, high = statistics.median(found), min(found), max(found)
        print(f"{name:8} {1e3 * median:8.2f} ms per step (median; {1e3 * low:.2f} to {1e3 * high:.2f})")
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"the engine takes {medians['engine'] / medians['by hand'] - 1:+.1%}")


if __name__ == "__main__":
    main()
