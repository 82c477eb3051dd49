"""Latent actions of every pair of frames: `python -m Step2_GIDM.label …` (configs/step2_label.yaml).

The file holds one row per pair: `clip` (row of the clip tables), `frame` and `later` (positions in the clip),
`indices` [N, Q] (codes) and `vectors` [N, Q, Z] (their entries in the codebook); and per clip `name`,
`start`, `text`. Plain arrays only.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from omegaconf import DictConfig
from rich.progress import track

from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.output import write_file
from defi.errors import UserError
from Step2_GIDM.data.augment import resize
from Step2_GIDM.data.build import build_source
from Step2_GIDM.data.pairs import Clip, Source
from Step2_GIDM.model import GIDM

CHUNK = 64  # earlier frames labelled at once


def pairs_of(clip: Clip, distance: int) -> Int[np.ndarray, "N 2"]:
    """Positions (now, later) of all pairs of a clip, the later frame clamped to the clip's end."""
    now = np.arange(clip.length - 1)
    return np.stack([now, np.minimum(now + distance, clip.length - 1)], axis=1)


@torch.no_grad()
def label_clip(
    model: GIDM, source: Source, clip: Clip, distance: int
) -> Iterator[tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, "n Q"]]]:
    """Pairs of a clip and their codes, chunk by chunk; every frame of a chunk goes through DINO once."""
    device = next(model.core.parameters()).device
    pairs = pairs_of(clip, distance)
    for first in range(0, len(pairs), CHUNK):
        chunk = pairs[first : first + CHUNK]
        positions = np.unique(chunk)
        pixels = torch.from_numpy(source.read(clip, positions.tolist())).permute(0, 3, 1, 2)
        patches = model.dino(resize(pixels, model.config.dino.image_size).to(device))
        rows = torch.from_numpy(np.searchsorted(positions, chunk)).to(device)
        actions = model.encode(patches[rows], [clip.text] * len(chunk))
        yield chunk, actions.indices.cpu().numpy()


def label(model: GIDM, source: Source, distance: int) -> dict[str, np.ndarray]:
    """The arrays of the output file."""
    model.eval()
    clips, pairs, indices = [], [], []
    for number, clip in enumerate(track(source.clips, description="clips")):
        for chunk, codes in label_clip(model, source, clip, distance):
            clips.append(np.full(len(chunk), number))
            pairs.append(chunk)
            indices.append(codes)
    if not pairs:
        raise UserError("data: no clip has two frames; give longer videos")
    now, later = np.concatenate(pairs).T
    codes = np.concatenate(indices)
    return {
        "clip": np.concatenate(clips),
        "frame": now,
        "later": later,
        "indices": codes,
        "vectors": model.tokenizer.quantizer.codebook.detach().cpu().numpy()[codes],
        "name": np.array([clip.name for clip in source.clips], dtype=str),
        "start": np.array([clip.start for clip in source.clips]),
        "text": np.array([clip.text for clip in source.clips], dtype=str),
    }


@entry("step2_label")
def main(cfg: DictConfig) -> None:
    output = Path(cfg.output)
    if output.suffix != ".npz":
        raise UserError(f"output={output}: must be a file that ends in .npz")
    if output.exists() and not cfg.overwrite:
        raise UserError(f"{output}: exists; overwrite=true replaces it")
    model = GIDM.from_pretrained(find_weights(Path(cfg.checkpoint), stage="gidm"))
    arrays = label(model, build_source(cfg.data), cfg.data.distance[1])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, buffer.getvalue())
    print(f"{len(arrays['frame']):,} pairs of {len(arrays['name']):,} clips in {output}")


if __name__ == "__main__":
    main()
