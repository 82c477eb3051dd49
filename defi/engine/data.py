"""The order of samples: a pure function of (seed, position), whatever the processes or loader workers.

A data set is map-style and its samples are dicts. If it draws random numbers (crops, jitter, offsets), it
defines `sample(index, rng)` instead of `__getitem__(index)` and draws from `rng` alone, a NumPy generator
made from (seed, epoch, index): the same sample comes out in any worker, process or batch, and another one in
the next epoch. Global generators (torch.rand, np.random) must not be used inside data sets.

Random numbers come in named streams, one per purpose: a seed and a name are hashed to the 128 bits that a
generator starts from (`stream`). So no stream is another one's, or a part of it, whatever the seeds.
"""

import atexit
import hashlib
import itertools
import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from jaxtyping import Float, Int, Int64, UInt64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from defi.engine.config import TrainerConfig
from defi.errors import UserError
from defi.processes import print_once

GOODBYE = 5.0  # seconds that a process takes at most from closing its pipes to its end
ROUNDS = 12  # of a shuffle: as many as the smallest data sets need to look shuffled
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
Draw = tuple[int, int]  # (epoch, index)
Process = tuple[int, int]  # (its number, how many there are)
Batch = dict[str, Any]
Item = TypeVar("Item")
Value = TypeVar("Value")


# ---------------------------------------------------------------- named streams of random numbers


def _hash(size: int, *name: object) -> int:
    text = " ".join(map(str, name)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=size).digest(), "little")


def seed_of(purpose: str, *numbers: int) -> int:
    """One seed of 63 bits for a purpose, out of several numbers, a run's seed and a sample's number say."""
    return _hash(8, purpose, *numbers) >> 1


def sample_seeds(purpose: str, seed: int, count: int) -> Int[Tensor, " N"]:
    """Seeds of `count` samples that are drawn outside of training, for pictures say."""
    return torch.tensor([seed_of(purpose, seed, i) for i in range(count)])


def stream(purpose: str, *numbers: int) -> np.random.Generator:
    """The random numbers of a purpose; `numbers` are a seed, or what makes one."""
    return np.random.default_rng(_hash(16, purpose, *numbers))


class SampleNoise:
    """Random numbers that belong to samples, not to batches: equal for any batch size or number of processes.

    The same seed (of the batch, on the CPU) and purpose give the same numbers again, on `device`; another
    purpose gives independent ones.
    """

    def __init__(self, seeds: Int[Tensor, " B"], device: torch.device) -> None:
        self.seeds, self.device = seeds.tolist(), device

    def normal(self, purpose: str, *shape: int) -> Float[Tensor, "B ..."]:
        """Standard normal numbers of `shape` for each sample."""
        return self._stack([stream(purpose, s).standard_normal(shape, np.float32) for s in self.seeds])

    def uniform(self, purpose: str, *shape: int) -> Float[Tensor, "B ..."]:
        """Numbers uniform in [0, 1) of `shape` for each sample."""
        return self._stack([stream(purpose, s).random(shape, np.float32) for s in self.seeds])

    def others(self, purpose: str) -> Int[Tensor, " B"]:
        """A seed for each sample's part in something else, which has a `SampleNoise` of its own."""
        return torch.tensor([seed_of(purpose, seed) for seed in self.seeds])

    def _stack(self, drawn: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(drawn)).to(self.device)


# ---------------------------------------------------------------- samples and their order


class Shuffle:
    """An endless stream of the numbers below `size`: one keyed pseudo-random permutation per epoch.

    A Feistel network over pairs (left, right) of numbers below a and b, a·b ≥ size, that adds a hash of one
    half to the other, in turn: invertible, so a permutation of a·b numbers. What comes out beyond `size` is
    put in again until it does not, which leaves a permutation of `size` numbers (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains", sections 4 and 5). Hash: the finaliser of SplitMix64 (Steele et
    al. 2014). Statistically a shuffle, not a cipher. No memory that grows with `size`.
    """

    def __init__(self, size: int, seed: int) -> None:
        left = math.isqrt(size - 1) + 1
        self.size, self.left, self.right = np.uint64(size), np.uint64(left), np.uint64(-(-size // left))
        self._keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def at(self, positions: Int64[np.ndarray, " N"]) -> tuple[Int64[np.ndarray, " N"], ...]:
        """Epochs and numbers at these positions of the stream; every `size` positions are an epoch."""
        epochs, numbers = np.divmod(positions.astype(np.uint64), self.size)
        keys = _mixed(self._keys[:, None] + epochs * GOLDEN)
        numbers = self._permuted(numbers, keys)
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._permuted(numbers[outside], keys[:, outside])
        return epochs.astype(np.int64), numbers.astype(np.int64)

    def _permuted(
        self, numbers: UInt64[np.ndarray, " N"], keys: UInt64[np.ndarray, "K N"]
    ) -> UInt64[np.ndarray, " N"]:
        left, right = np.divmod(numbers, self.right)
        for even, odd in zip(keys[::2], keys[1::2]):
            left = (left + _mixed(right + even) % self.left) % self.left
            right = (right + _mixed(left + odd) % self.right) % self.right
        return left * self.right + right


def _mixed(x: UInt64[np.ndarray, " *N"]) -> UInt64[np.ndarray, " *N"]:
    """64 well-mixed bits for each number."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class StepOrder(Sampler[list[Draw]]):
    """Endless micro-batches of one process, starting at a position in the stream of samples (`Shuffle`).

    Step k takes the samples [k·G, (k+1)·G); process r of P takes every P-th of those from the r-th on, in
    micro-batches. So a position is one number, and the global batches do not depend on P or on the
    micro-batch.
    """

    AHEAD = 1024  # positions that are looked up at once, because that costs little more than one

    def __init__(
        self, size: int, *, seed: int, start: int, global_batch: int, micro_batch: int, process: Process
    ) -> None:
        self.size, self.start = size, start
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.processes = process
        self._shuffle = Shuffle(size, seed)
        self._block: tuple[int, list[Draw]] = (-1, [])

    def draw(self, position: int) -> Draw:
        """Epoch and index of the sample at a position of the stream."""
        block, offset = divmod(position, self.AHEAD)
        if self._block[0] != block:
            epochs, indices = self._shuffle.at(block * self.AHEAD + np.arange(self.AHEAD))
            self._block = (block, list(zip(epochs.tolist(), indices.tolist())))
        return self._block[1][offset]

    def __iter__(self) -> Iterator[list[Draw]]:
        for first in itertools.count(self.start, self.global_batch):
            share = range(first + self.rank, first + self.global_batch, self.processes)
            draws = [self.draw(position) for position in share]
            yield from (draws[i : i + self.micro_batch] for i in range(0, len(draws), self.micro_batch))


class SeededDataset(Dataset):
    """Gives each draw of a data set its own random numbers, and the sample its number `seed`.

    If `tolerant`, a sample that cannot be read is replaced by another one, a function of the draw alone, and
    `fault` has a line for each such sample.
    """

    TRIES = 20

    def __init__(self, dataset: Dataset, seed: int, *, tolerant: bool) -> None:
        self.dataset, self.seed, self.tolerant = dataset, seed, tolerant

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        if not self.tolerant:
            return self._read(draw)
        others = stream("other samples", self.seed, *draw).integers(len(self.dataset), size=self.TRIES)
        faults: list[str] = []
        for candidate in (draw[1], *others.tolist()):
            try:
                return {**self._read((draw[0], candidate)), "fault": "\n".join(faults)}
            except UserError as error:
                faults.append(f"sample {candidate}: {error}")
        raise UserError(faults[-1])

    def _read(self, draw: Draw) -> dict[str, Any]:
        seed, index = seed_of("training", self.seed, *draw), draw[1]
        random = hasattr(self.dataset, "sample")
        sample = self.dataset.sample(index, stream("sample", seed)) if random else self.dataset[index]
        return {**sample, "seed": seed}


def readable(read: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[tuple[Item, Value]]:
    """Each item that can be read, and what `read` makes of it; at the end a line counts the others.

    For what is only shown: in training `SeededDataset` replaces such items. UserError if none can be read.
    """
    items, faults = list(items), []
    for item in items:
        try:
            value = read(item)
        except UserError as error:
            faults.append(error)
        else:
            yield item, value
    if faults and len(faults) == len(items):
        raise faults[0]
    if faults:
        print_once(f"left out: {len(faults)} of {len(items)} samples to look at; the first: {faults[0]}")


class Feed:
    """Batches of one process, step by step, with the time spent waiting for them.

    samples: position in the stream: samples that all processes have consumed.
    waited: seconds spent waiting for data since it was last set to 0.
    parts: pieces that a loaded micro-batch is split into, where the memory does not hold it.
    faults: samples of this process that could not be read and were replaced, and why.
    """

    def __init__(
        self, dataset: Dataset, trainer: TrainerConfig, accelerator: Accelerator, *, seed: int, start: int
    ) -> None:
        self.trainer, self.device = trainer, accelerator.device
        micro_batch, self.accumulation = trainer.split_batch(accelerator.num_processes)
        self.order = StepOrder(
            len(dataset), seed=seed, start=start, global_batch=trainer.global_batch, micro_batch=micro_batch,
            process=(accelerator.process_index, accelerator.num_processes),
        )  # fmt: skip
        self.samples, self.waited, self.parts = start, 0.0, 1
        self.faults: list[str] = []
        loader = DataLoader(
            SeededDataset(dataset, seed, tolerant=trainer.bad_samples > 0),
            batch_sampler=self.order,
            num_workers=trainer.workers,
            worker_init_fn=leave_signals,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader would draw from the generator of the training
        )
        self._batches = iter(loader)
        atexit.register(self.close)  # what fails before anyone closes this must not leave workers behind

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step, on the device; strings and `seed` stay where they are.

        UserError if a sample cannot be read, or more than `trainer.bad_samples` were replaced.
        """
        start = time.perf_counter()
        try:
            batches = [next(self._batches) for _ in range(self.accumulation)]
        except (ConnectionError, EOFError) as error:  # before the loader notices
            time.sleep(GOODBYE)  # its signal handler raises an error that says more, here and not later
            raise RuntimeError(f"DataLoader worker: {error}") from error
        except (UserError, OSError) as error:
            # A worker sends its traceback along, which ends with the message.
            reason = re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])
            lost = f"data: {reason}; restore it, then continue with resume=true"
            raise UserError(reason if isinstance(error, UserError) else lost) from None
        self.waited += time.perf_counter() - start
        self.samples += self.trainer.global_batch
        self.faults += [line for b in batches for lines in b.pop("fault", []) for line in lines.splitlines()]
        drawn = max(self.samples - self.order.start, self.order.size) / self.order.processes
        if (count := len(self.faults)) > (allowed := self.trainer.bad_samples) * drawn:
            what = f"{count} samples could not be read, more than trainer.bad_samples={allowed} allows"
            latest = "; ".join(dict.fromkeys(self.faults[-3:]))
            raise UserError(f"data: {what}; fix or remove them, or raise it: {latest}")
        parts = split(batches, self.parts)
        return [send_to_device(part, self.device, non_blocking=True, skip_keys="seed") for part in parts]

    def indices(self) -> list[int]:
        """Indices in the data set of the latest step's samples, of all processes."""
        first = self.samples - self.trainer.global_batch
        return [self.order.draw(position)[1] for position in range(first, self.samples)]

    @property
    def micro_batch(self) -> int:
        """Samples of one forward pass."""
        return self.order.micro_batch // self.parts

    def shrink(self, batches: list[Batch]) -> list[Batch]:
        """From now on take fewer samples at a time; returns these batches split so."""
        factor = next(n for n in range(2, self.micro_batch + 1) if self.micro_batch % n == 0)
        self.parts *= factor
        return split(batches, factor)

    @property
    def epochs(self) -> float:
        """Epochs (of one or several passes over the data) so far."""
        return self.samples / (self.trainer.passes * self.order.size)

    @property
    def ended_epoch(self) -> bool:
        """Whether the latest step took the last sample of an epoch."""
        size = self.trainer.passes * self.order.size
        return self.samples // size > (self.samples - self.trainer.global_batch) // size

    def close(self) -> None:
        """Let the loader workers go, now: the traceback of an error may hold the loader till the very end."""
        atexit.unregister(self.close)
        if hasattr(self._batches, "_shutdown_workers"):
            self._batches._shutdown_workers()
        del self._batches


def leave_signals(worker: int) -> None:
    """The main process answers a signal to the run; a second SIGTERM ends this loader worker too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def split(batches: list[Batch], parts: int) -> list[Batch]:
    """Batches of B samples, each as `parts` batches of B / parts."""
    if parts == 1:
        return batches
    size = len(batches[0]["seed"]) // parts
    pieces = [slice(first, first + size) for first in range(0, size * parts, size)]
    return [{name: value[piece] for name, value in b.items()} for b in batches for piece in pieces]
