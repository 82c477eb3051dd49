"""The order of samples: a pure function of (seed, position), whatever the processes or loader workers.

A data set is map-style and its samples are dicts. If it draws random numbers (crops, jitter, offsets), it
defines `sample(index, rng)` instead of `__getitem__(index)` and draws from `rng` alone, a NumPy generator
made from (seed, epoch, index): the same sample comes out in any worker, process or batch, and another one in
the next epoch. Global generators (torch.rand, np.random) must not be used inside data sets.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from defi.errors import UserError

Draw = tuple[int, int]  # (epoch, index)


class StepOrder(Sampler[list[Draw]]):
    """Endless micro-batches of one process, starting at a position in the stream of samples.

    The stream is a fresh seeded permutation of all indices per epoch, one after the other. Step k takes the
    samples [k·G, (k+1)·G); process r of P takes every P-th of those from the r-th on, in micro-batches.
    So a position is one number, and the global batches do not depend on P or on the micro-batch.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        start: int,
        global_batch: int,
        micro_batch: int,
        process: tuple[int, int],
    ) -> None:
        self.size, self.seed, self.start = size, seed, start
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.processes = process
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0))

    def draw(self, position: int) -> Draw:
        """Epoch and index of the sample at a position of the stream."""
        epoch, offset = divmod(position, self.size)
        if self._permutation[0] != epoch:
            self._permutation = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size))
        return epoch, int(self._permutation[1][offset])

    def __iter__(self) -> Iterator[list[Draw]]:
        position = self.start
        while True:
            share = range(position + self.rank, position + self.global_batch, self.processes)
            draws = [self.draw(p) for p in share]
            for first in range(0, len(draws), self.micro_batch):
                yield draws[first : first + self.micro_batch]
            position += self.global_batch


class SeededDataset(Dataset):
    """Gives each draw of a data set its own random numbers, and the sample its number `seed`."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        epoch, index = draw
        digest = hashlib.blake2b(f"{self.seed} {epoch} {index}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") >> 1  # fits a signed 64-bit integer
        if hasattr(self.dataset, "sample"):
            sample = self.dataset.sample(index, np.random.default_rng(seed))
        else:
            sample = self.dataset[index]
        return {**sample, "seed": seed}


class SampleNoise:
    """Random numbers that belong to samples, not to batches: equal for any batch size or number of processes.

    Args:
        seeds: the batch's `seed`, on the CPU.
        device: where the numbers are wanted.
    """

    def __init__(self, seeds: Int[Tensor, " B"], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        self.device = device

    def normal(self, *shape: int) -> Float[Tensor, "B ..."]:
        """Standard normal numbers of `shape` for each sample."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def uniform(self, *shape: int) -> Float[Tensor, "B ..."]:
        """Numbers uniform in [0, 1) of `shape` for each sample."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(self.device)


class Feed:
    """Batches of one process, step by step, with the time spent waiting for them.

    Attributes:
        samples: position in the stream: samples that all processes have consumed.
        waited: seconds spent waiting for data since it was last set to 0.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: StepOrder,
        *,
        accumulation: int,
        workers: int,
        device: torch.device,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    ) -> None:
        self.order, self.accumulation, self.device = order, accumulation, device
        self.samples = order.start
        self.waited = 0.0
        loader = DataLoader(
            SeededDataset(dataset, order.seed),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else the loader would draw from the generator of the training
        )
        self._batches = iter(loader)

    def next_step(self) -> list[dict[str, Any]]:
        """The micro-batches of the next step, on the device; strings and `seed` stay where they are."""
        start = time.perf_counter()
        try:
            batches = [next(self._batches) for _ in range(self.accumulation)]
        except UserError as error:  # a loader worker sends its traceback along
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
        self.waited += time.perf_counter() - start
        self.samples += self.order.global_batch
        return [self._to_device(batch) for batch in batches]

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.samples / self.order.size

    @property
    def ended_epoch(self) -> bool:
        """Whether the latest step took the last sample of a pass."""
        before = self.samples - self.order.global_batch
        return self.samples // self.order.size > before // self.order.size

    def close(self) -> None:
        """Let the loader workers go."""
        del self._batches

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.device.type == "cpu":
            return batch
        return {
            name: value.to(self.device, non_blocking=True)
            if torch.is_tensor(value) and name != "seed"
            else value
            for name, value in batch.items()
        }
