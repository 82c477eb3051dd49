"""The random generators that a model may draw from: read and put back."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


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
