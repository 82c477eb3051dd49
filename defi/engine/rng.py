"""The random generators that a model may draw from: read, put back, and kept in a checkpoint."""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defi.engine.weights import COPY_AGAIN
from defi.errors import reading
from defi.files import read_json


def rng_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and the current GPU."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `rng_state` found them; its tensors, arrays and tuples may be lists."""
    version, words, gauss = state["python"]
    kind, keys, position, *rest = state["numpy"]
    if not 0 <= position <= len(keys):  # NumPy would read beyond the array
        raise ValueError("a position outside of the keys")
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, *rest))
    torch.set_rng_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.as_tensor(state["cuda"], dtype=torch.uint8))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What is drawn inside this context does not change what is drawn after it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def write_rng(file: Path, states: list[dict[str, Any]]) -> None:
    """Write the `rng_state` of every process as JSON."""
    file.write_text(json.dumps(states, default=lambda state: state.tolist()))


def read_rng(file: Path) -> list[dict[str, Any]]:
    """What `write_rng` wrote, tried on the generators.

    Raises:
        UserError: the file is missing or damaged, or no generator has such a state.
    """
    states = read_json(file, COPY_AGAIN, kind=list)
    with reading(file, COPY_AGAIN), preserved_rng():
        for state in states or [{}]:
            set_rng_state(state)
    return states
