"""What a checkpoint costs: `python -m benchmarks.checkpoint [--parameters 5e7] [--folder DIR]`.

Compares, in one run, the pause of training by
  plain       writing everything before the next step, as a plain save does
  background  copying the state and writing it in a thread (`CheckpointWriter`), what training uses
for a model with averages and AdamW, and prints the time of steps while a thread writes, and peak memory.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from defi.engine import checkpoint
from defi.engine.checkpoint import CheckpointWriter
from defi.engine.model import StageModel
from defi.engine.optimizer import EMA, optimizer_tensors
from defi.engine.state import TrainingState, rng_state

WIDTH = 1024


@dataclass
class StackConfig:
    layers: int


class Stack(StageModel):
    """Square linear layers: as many bytes as wanted, steps of some milliseconds."""

    stage = "policy"
    config_class = StackConfig

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(config.layers)))

    def forward(self, batch: dict) -> dict[str, Tensor]:
        return {"loss": self.net(batch["x"]).square().mean()}


class Training:
    """A model, its averages and its optimizer after a first step."""

    def __init__(self, parameters: float) -> None:
        torch.manual_seed(0)
        self.model = Stack(StackConfig(max(1, round(parameters / WIDTH**2))))
        self.ema = EMA(self.model, 0.99)
        self.optimizer = AdamW(self.model.parameters(), fused=True)
        self.step()
        self.state = TrainingState(self.model, self.ema, optimizer_tensors(self.optimizer, self.model))

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.model({"x": torch.randn(16, WIDTH)})["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return time.perf_counter() - start


def write(run: Path, state: TrainingState) -> None:
    checkpoint.save(state.model, run, step=state.progress.step, config={}, state=state)
    checkpoint.rotate(run, keep=1)


def save_plainly(training: Training, run: Path, step: int) -> None:
    """Everything on the disk before it returns."""
    training.state.progress.step, training.state.rng = step, [rng_state()]
    write(run, training.state)


def save_in_background(training: Training, writer: CheckpointWriter, step: int) -> None:
    """Returns when the state is copied."""
    training.state.progress.step = step
    training.state.rng = [rng_state()]
    writer.save()


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak() -> float:
    """Most memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--parameters", type=float, default=5e7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        run, training = Path(place), Training(options.parameters)
        quiet = [training.step() for _ in range(10)]
        memory = [peak()]
        plain = [timed(lambda: save_plainly(training, run, 1)) for _ in range(2)]
        memory.append(peak())
        writer = CheckpointWriter(training.state, training.model.copied_to("cpu"), partial(write, run))
        pauses, writing, busy = [], [], []
        for step in range(2, options.rounds + 3):  # by turns, as the disk's speed changes
            plain.append(timed(lambda: save_plainly(training, run, step)))  # noqa: B023
            start = time.perf_counter()
            pauses.append(timed(lambda: save_in_background(training, writer, step + 1000)))  # noqa: B023
            while not writer.idle:
                busy.append(training.step())
            writing.append(time.perf_counter() - start)
        memory.append(peak())
        writer.wait()
        size = sum(f.stat().st_size for f in checkpoint.find_checkpoint(run).rglob("*") if f.is_file())
    usual = statistics.median(plain)
    first, later = pauses[0], statistics.median(pauses[1:])
    print(f"checkpoint of {size / 1e6:,.0f} MB ({options.parameters / 1e6:g} M parameters), seconds:")
    print(f"  plain       {usual:7.3f}  until training goes on (from {min(plain):.3f} to {max(plain):.3f})")
    print(
        f"  background  {later:7.3f}  = {later / usual:.0%} of it; the first, which takes memory: {first:.3f}"
    )
    print(f"              {statistics.median(writing):7.3f}  until it is on the disk")
    print(f"  a step      {statistics.median(quiet):7.4f}  usually")
    print(f"              {statistics.median(busy or [0.0]):7.4f}  while a thread writes")
    print(f"memory at most: {memory[0]:,.0f} MB in training, {memory[1]:,.0f} MB with plain saves, "
          f"{memory[2]:,.0f} MB in the background")  # fmt: skip


if __name__ == "__main__":
    main()
