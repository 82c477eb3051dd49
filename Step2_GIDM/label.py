"""Latent actions of every pair of frames: `python -m Step2_GIDM.label …` (configs/step2_label.yaml).

One row per frame of a clip, an episode as one camera saw it: the episode's `name` and `start` (the number of
its first frame), `camera`; the frame's `text`, `frame` and `later` (positions in the episode; at its end both
are the last), `indices` [Q] (codes, rows of `codebook`).

    codes.parquet   written clip by clip, so of any length; the codebook as JSON in the file's metadata
    codes.npz       plain arrays, held in memory: `clip` [N] is the row of `name`, `start` and `camera`,
                    `said` [N] that of `text`; and `codebook` [codes, Z]

All of a data set is labelled where its section does not ask for less: RLDS' complete `train`, all of CALVIN's
recordings. A clip that cannot be read is left out; the last line says what was labelled, and what was not.

The processes of `accelerate launch` take clips in turn. The file appears when it is complete; it is the same
for any number of processes, and after a run that was killed.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from omegaconf import DictConfig
from rich.progress import track

from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.output import write_file
from defi.errors import UserError
from defi.processes import print_once, processes
from Step2_GIDM.data.build import build_pairs
from Step2_GIDM.data.images import resize
from Step2_GIDM.data.pairs import PairDataset, later
from Step2_GIDM.model import GIDM

CHUNK = 64  # earlier frames labelled at once
CLIP = ("name", "start", "camera")  # columns that are the same for all of a clip
Columns = dict[str, Any]  # of the table, by name: as many values as a clip has frames
Write = Callable[[Columns], object]


@torch.no_grad()
def label_clip(model: GIDM, data: PairDataset, number: int) -> Columns | UserError:
    """The rows of a clip; every frame of a chunk of pairs is read and goes through DINO once.

    Returns why it cannot be read, if so: the other processes wait for an answer.
    """
    device = next(model.core.parameters()).device
    episode, camera = data.clip(number)
    pairs = np.array([(now, later(episode, now, data.distance[1])) for now in range(episode.length)])
    texts, indices = [episode.text(now) for now in range(episode.length)], []
    for first in range(0, len(pairs), CHUNK):
        chunk = pairs[first : first + CHUNK]
        positions = np.unique(chunk)
        try:
            pixels = data.read(episode, camera, positions.tolist())
        except UserError as error:
            return error
        patches = model.dino(resize(pixels, data.image_size).to(device))
        rows = torch.from_numpy(np.searchsorted(positions, chunk)).to(device)
        indices.append(model.encode(patches[rows], texts[first : first + CHUNK]).indices.cpu().numpy())
    clip = dict(zip(CLIP, (episode.name, episode.start, camera)))
    columns = {name: [value] * episode.length for name, value in clip.items()} | {"text": texts}
    columns |= {"frame": pairs[:, 0].astype(np.int32), "later": pairs[:, 1].astype(np.int32)}
    return columns | {"indices": np.concatenate(indices).astype(np.int16)}


def label(model: GIDM, data: PairDataset, write: Write) -> str:
    """Write the rows of all clips that have frames, in order; each process computes its share.

    Returns what was labelled of the data set, and what was not; a line says why a clip could not be read.

    Raises:
        UserError: no clip can be read.
    """
    state, rows, clips, faults = processes(), 0, 0, []
    filled = data.lengths.nonzero()[0].tolist()
    rounds = range(0, len(filled), state.num_processes)
    for first in track(rounds, description="clips", disable=not state.is_main_process):
        own = filled[first : first + state.num_processes][state.process_index :][:1]
        for found in gather_object([label_clip(model, data, number) for number in own]):
            if isinstance(found, UserError):
                faults.append(found)
                print_once(f"left out: {found}")
            else:
                write(found)
                rows, clips = rows + len(found["text"]), clips + 1
    if not clips:
        raise UserError(f"data: none of {len(filled)} clips can be read; the first: {faults[0]}")
    counts = {"that cannot be read": len(faults), "without frames": len(data.lengths) - len(filled)}
    left_out = [f"clips {which} ({count:,})" for which, count in counts.items() if count]
    left_out += [f"the camera {name} (data.cameras)" for name in data.data.cameras[len(data.cameras) :]]
    left_out += data.data.left_out
    labelled = f"{rows:,} pairs of {clips:,} clips of {data.data.scope}"
    return f"{labelled}; left out: {', '.join(left_out)}" if left_out else labelled


@contextmanager
def write_npz(path: Path, codebook: np.ndarray) -> Iterator[Write]:
    """Plain arrays, held in memory."""
    parts: list[Columns] = []
    yield parts.append
    buffer = io.BytesIO()
    columns = {name: np.concatenate([part[name] for part in parts]) for name in ("frame", "later", "indices")}
    columns["clip"] = np.repeat(np.arange(len(parts)), [len(part["text"]) for part in parts])
    columns |= {name: np.array([part[name][0] for part in parts]) for name in CLIP}
    texts = [text for part in parts for text in part["text"]]
    columns["text"], columns["said"] = np.unique(texts, return_inverse=True)
    np.savez_compressed(buffer, codebook=codebook, **columns)
    write_file(path, buffer.getvalue())


@contextmanager
def write_parquet(path: Path, codebook: np.ndarray) -> Iterator[Write]:
    """A table, clip by clip; an error leaves nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {"name": pa.string(), "start": pa.int64(), "camera": pa.string(), "text": pa.string()}
    fields |= {"frame": pa.int32(), "later": pa.int32(), "indices": pa.list_(pa.int16())}
    schema = pa.schema(fields, metadata={"codebook": json.dumps(codebook.tolist())})
    partial = path.with_name(f".{path.name}.writing")
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as file:
            yield lambda columns: file.write_table(
                pa.table(columns | {"indices": list(columns["indices"])}, schema=schema)
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


WRITERS = {".parquet": write_parquet, ".npz": write_npz}


@entry("step2_label")
def main(cfg: DictConfig) -> None:
    output = Path(cfg.output)
    if output.suffix not in WRITERS:
        raise UserError(f"output={output}: must be a file that ends in {' or '.join(WRITERS)}")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"output={output}: needs the package pyarrow; pip install it, or write .npz")
    if output.exists() and not cfg.overwrite:
        raise UserError(f"{output}: exists; overwrite=true replaces it")
    if "sets" in cfg.data:
        raise UserError("data: is a mixture; label its data sets one by one")
    state = processes()
    model = GIDM.from_pretrained(find_weights(Path(cfg.checkpoint), stage="gidm")).to(state.device).eval()
    codebook = model.tokenizer.quantizer.codebook.detach().cpu().numpy()
    data = build_pairs(cfg.data, model.config.dino.image_size, "all")
    writer: AbstractContextManager[Write] = nullcontext(lambda _: None)
    try:
        if state.is_main_process:
            output.parent.mkdir(parents=True, exist_ok=True)
            writer = WRITERS[output.suffix](output, codebook)
        with writer as write:
            summary = label(model, data, write)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); free some space, run it again"
        ) from None
    print_once(f"{output}: {summary}")


if __name__ == "__main__":
    main()
