"""Latent actions of every pair of frames: `python -m Step2_GIDM.label …` (configs/step2_label.yaml).

One row per frame of a clip, as in training: `frame` and `later` (positions in the clip; at its end both are
the last), `indices` [Q] (codes). The codes' vectors are the rows of the `codebook` [codes, Z].

    codes.parquet   written clip by clip, so of any length; clip's name and start and the frame's text in
                    every row, the codebook as JSON in the file's metadata. Needs the package pyarrow
    codes.npz       plain arrays, held in memory: `clip` [N] is the row of `name` and `start`, `said` [N]
                    that of `text`

All of a data set is labelled where its section does not ask for less: RLDS' whole `train`, all of CALVIN's
recordings (`data.language=true`: the annotated spans, with their instructions). A clip that cannot be read is
left out; the last line says what was labelled, and what was not.

The processes of `accelerate launch` take clips in turn. The file appears when it is complete; it is the same
for any number of processes, and after a run that was killed.
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Int
from omegaconf import DictConfig
from rich.progress import track

from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.output import write_file
from defi.errors import UserError
from defi.processes import print_once, processes
from Step2_GIDM.data.build import read_section
from Step2_GIDM.data.pairs import Clip, Source
from Step2_GIDM.data.resize import resize
from Step2_GIDM.model import GIDM

CHUNK = 64  # earlier frames labelled at once


@dataclass(frozen=True)
class Labels:
    """Pairs of one clip, in order, the texts of their earlier frames, and their codes."""

    clip: Clip
    pairs: Int[np.ndarray, "N 2"]
    texts: list[str]
    indices: Int[np.ndarray, "N Q"]


@torch.no_grad()
def label_clip(model: GIDM, source: Source, clip: Clip, distance: int) -> Labels:
    """A clip of at least one frame; every frame of a chunk of pairs is read and goes through DINO once."""
    device = next(model.core.parameters()).device
    pairs = np.array([clip.pair(now, distance) for now in range(clip.length)])
    texts, indices = [clip.text(now) for now in range(clip.length)], []
    for first in range(0, len(pairs), CHUNK):
        chunk = pairs[first : first + CHUNK]
        positions = np.unique(chunk)
        pixels = torch.from_numpy(source.read(clip, positions.tolist())).permute(0, 3, 1, 2)
        patches = model.dino(resize(pixels, model.config.dino.image_size).to(device))
        rows = torch.from_numpy(np.searchsorted(positions, chunk)).to(device)
        found = model.encode(patches[rows], texts[first : first + CHUNK])
        indices.append(found.indices.cpu().numpy())
    return Labels(clip, pairs, texts, np.concatenate(indices).astype(np.int16))


class Labelling:
    """The labels of all clips that have frames, in order, in every process; each computes its share.

    Iterating once counts what was labelled; a line says why a clip could not be read.

    Raises:
        UserError: no clip has a frame, or none can be read.
    """

    def __init__(self, model: GIDM, source: Source, distance: int) -> None:
        self.model, self.source, self.distance = model.eval(), source, distance
        self.pairs, self.clips, self.unread = 0, 0, 0

    def __iter__(self) -> Iterator[Labels]:
        state, first_error = processes(), None
        filled = self.source.lengths.nonzero()[0].tolist()
        rounds = range(0, len(filled), state.num_processes)
        for first in track(rounds, description="clips", disable=not state.is_main_process):
            own = filled[first : first + state.num_processes][state.process_index :][:1]
            for found in gather_object([self._label(self.source.clip(i)) for i in own]):
                if isinstance(found, UserError):
                    self.unread += 1
                    first_error = first_error or found
                    print_once(f"left out: {found}")
                else:
                    self.pairs, self.clips = self.pairs + len(found.pairs), self.clips + 1
                    yield found
        if not self.clips:
            if first_error is None:
                raise UserError("data: no clip has a frame; give longer videos")
            raise UserError(f"data: none of {len(filled)} clips can be read; the first: {first_error}")

    def _label(self, clip: Clip) -> Labels | UserError:
        try:
            return label_clip(self.model, self.source, clip, self.distance)
        except UserError as error:
            return error

    def summary(self) -> str:
        """What was labelled of the data set, and what was not."""
        empty = len(self.source.lengths) - self.clips - self.unread
        left_out = [f"clips that cannot be read ({self.unread:,})"] if self.unread else []
        left_out += [f"clips without frames ({empty:,})"] if empty else []
        left_out += self.source.left_out
        labelled = f"{self.pairs:,} pairs of {self.clips:,} clips of {self.source.scope}"
        return f"{labelled}; left out: {', '.join(left_out)}" if left_out else labelled


def write_npz(path: Path, labels: Iterable[Labels], codebook: np.ndarray) -> None:
    """Write plain arrays."""
    found = list(labels)
    now, later = np.concatenate([part.pairs for part in found]).T
    texts, said = np.unique([text for part in found for text in part.texts], return_inverse=True)
    arrays = {
        "clip": np.repeat(np.arange(len(found)), [len(part.pairs) for part in found]),
        "frame": now,
        "later": later,
        "indices": np.concatenate([part.indices for part in found]),
        "codebook": codebook,
        "name": np.array([part.clip.name for part in found], dtype=str),
        "start": np.array([part.clip.start for part in found]),
        "said": said,
        "text": texts,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_file(path, buffer.getvalue())


def write_parquet(path: Path, labels: Iterable[Labels], codebook: np.ndarray) -> None:
    """Write a table, clip by clip; it appears when it is complete; an error leaves nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {"name": pa.string(), "start": pa.int64(), "text": pa.string(), "frame": pa.int32()}
    fields |= {"later": pa.int32(), "indices": pa.list_(pa.int16())}
    schema = pa.schema(fields, metadata={"codebook": json.dumps(codebook.tolist())})
    partial = path.with_name(f".{path.name}.writing")
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as file:
            for part in labels:
                count = len(part.pairs)
                columns = {key: [getattr(part.clip, key)] * count for key in ("name", "start")}
                columns |= {"text": part.texts, "frame": part.pairs[:, 0], "later": part.pairs[:, 1]}
                file.write_table(pa.table(columns | {"indices": list(part.indices)}, schema=schema))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


WRITERS: dict[str, Callable[[Path, Iterable[Labels], np.ndarray], None]] = {
    ".parquet": write_parquet,
    ".npz": write_npz,
}


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
    model = GIDM.from_pretrained(find_weights(Path(cfg.checkpoint), stage="gidm")).to(state.device)
    codebook = model.tokenizer.quantizer.codebook.detach().cpu().numpy()
    section = read_section(cfg.data)
    labels = Labelling(model, section.open("all"), section.distance[1])
    if not state.is_main_process:
        for _ in labels:  # the main process writes them
            pass
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        WRITERS[output.suffix](output, labels, codebook)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); free some space, run it again"
        ) from None
    print(f"{output}: {labels.summary()}")


if __name__ == "__main__":
    main()
