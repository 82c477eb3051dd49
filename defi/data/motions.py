"""Actions and state of all frames of a data set: read once, kept in an index beside it.

    <root>/.defi/motions-<hash>/frames.npy   int64 [N]: numbers of the frames, ascending
                                actions.npy  float32 [N, A]
                                state.npy    float32 [N, S]
                                done         written last

Where it lies instead: `defi.engine.output.index_place`. The hash is of the data's fingerprint, the
names of the numbers and the frames. A killed run continues where it was (`part.npy`: a byte per block).
"""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int64
from rich.progress import track

from defi.engine.output import index_place, take_turn, write_file
from defi.errors import UserError, reading, writing
from defi.npy import map_npy

if TYPE_CHECKING:
    from defi.data.episode import Dataset

VERSION = 1  # of what is read and how it is kept
READERS = 4  # blocks that are read at the same time
DONE, PART = "done", "part.txt"  # part: blocks that are read, while not all are
NOTE_EVERY = 5.0  # seconds of reading that are done again after a kill


@dataclass(frozen=True)
class Motions:
    """Action and state of each frame, in the data's units; memory-mapped."""

    frames: Int64[np.ndarray, " N"]
    actions: Float32[np.ndarray, "N A"]
    state: Float32[np.ndarray, "N S"]

    def rows(self, frames: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Where frames lie, by their numbers in the data set, which must be among those of its episodes."""
        return np.searchsorted(self.frames, frames)


@dataclass(frozen=True)
class Statistics:
    """Of each dimension of actions or state, exact. low, high: the quantiles 0.01 and 0.99."""

    mean: Float[np.ndarray, " A"]
    std: Float[np.ndarray, " A"]
    minimum: Float[np.ndarray, " A"]
    maximum: Float[np.ndarray, " A"]
    low: Float[np.ndarray, " A"]
    high: Float[np.ndarray, " A"]

    @classmethod
    def of(cls, values: Float32[np.ndarray, "N A"]) -> "Statistics":
        values = np.asarray(values, np.float64)
        low, high = np.quantile(values, (0.01, 0.99), axis=0)
        return cls(values.mean(0), values.std(0), values.min(0), values.max(0), low, high)


def index_motions(dataset: "Dataset") -> Motions:
    """Of the frames of all episodes; one process reads them if no index holds them, others wait."""
    blocks = _blocks(dataset)
    frames = np.concatenate([np.arange(block.start, block.stop) for block in blocks])
    width = len(dataset.action_names), len(dataset.state_names)
    names = f"{VERSION} {dataset.fingerprint} {dataset.stamp} {dataset.action_names} {dataset.state_names} "
    bounds = np.array([(block.start, block.stop) for block in blocks])
    digest = hashlib.sha256(names.encode() + bounds.tobytes()).hexdigest()[:16]
    place = index_place(dataset.root, f"motions-{digest}", DONE)
    if not (place / DONE).is_file():
        with take_turn(place), writing(place, "actions and state", fix="repeat the command"):
            if not (place / DONE).is_file():
                _fill(dataset, place, blocks, frames, width)
    found = Motions(*(map_npy(place / f"{name}.npy") for name in ("frames", "actions", "state")))
    shapes = (found.frames.shape, found.actions.shape, found.state.shape)
    if shapes != ((len(frames),), (len(frames), width[0]), (len(frames), width[1])):
        raise UserError(f"{place}: damaged (shapes {shapes}); delete it, so that it is made again")
    return found


def _blocks(dataset: "Dataset") -> list[range]:
    """Frames of all episodes, as ranges that do not overlap, ascending."""
    blocks: list[range] = []
    order = np.argsort(dataset.starts, kind="stable")
    for start, length in zip(dataset.starts[order].tolist(), dataset.lengths[order].tolist()):
        if blocks and start < blocks[-1].stop:
            blocks[-1] = range(blocks[-1].start, max(blocks[-1].stop, start + length))
        elif length:
            blocks.append(range(start, start + length))
    if not blocks:
        raise UserError(f"{dataset.root}: no episode has a frame; give other data")
    return blocks


def _fill(
    dataset: "Dataset", place: Path, blocks: list[range], frames: np.ndarray, width: tuple[int, int]
) -> None:
    ends, done, noted = dataset.starts + dataset.lengths, 0, time.monotonic()
    firsts = np.searchsorted(frames, [block.start for block in blocks])
    joined, part = place / "joined.npy", place / PART
    if part.is_file():
        with reading(place, "delete it, so that it is made again"):
            values, done = np.load(joined, mmap_mode="r+"), int(part.read_text())
    else:
        shape = (len(frames), sum(width))
        values = np.lib.format.open_memmap(joined, mode="w+", dtype=np.float32, shape=shape)
        with joined.open("r+b") as file:  # takes the space: writing to mapped memory cannot fail
            os.posix_fallocate(file.fileno(), 0, values.offset + values.nbytes)

    def read(number: int) -> int:
        block = blocks[number]
        found = dataset.read_motions(block)
        if (wrong := ~np.isfinite(found)).any():
            frame, column = np.argwhere(wrong)[0]
            name = (*dataset.action_names, *dataset.state_names)[column]
            which = np.flatnonzero((dataset.starts <= block.start + frame) & (block.start + frame < ends))[0]
            episode = dataset.episode(int(which))
            where = f"{dataset.root}: episode {episode.name}, frame {block.start + frame - episode.start}"
            raise UserError(f"{where}: {name} is {found[frame, column]}; correct it or leave the episode out")
        values[firsts[number] : firsts[number] + len(block)] = found
        return number

    left = range(done, len(blocks))
    with ThreadPoolExecutor(READERS) as pool:  # perhaps a million small files: minutes
        for number in track(pool.map(read, left), "actions and state", total=len(left), transient=True):
            if time.monotonic() - noted > NOTE_EVERY:
                values.flush()
                write_file(part, str(number + 1))
                noted = time.monotonic()
    np.save(place / "frames.npy", frames)
    np.save(place / "actions.npy", values[:, : width[0]])
    np.save(place / "state.npy", values[:, width[0] :])
    write_file(place / DONE, "")
    for file in (joined, part):
        file.unlink(missing_ok=True)
