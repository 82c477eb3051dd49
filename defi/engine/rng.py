"""The random generators that a model may draw from: read and put back."""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and the current GPU."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators where `rng_state` found them, as it returned them or as `as_json` wrote them."""
    version, words, gauss = state["python"]
    kind, keys, position, *rest = state["numpy"]
    if not 0 <= position <= len(keys):  # NumPy would read beyond the array
        raise ValueError("a position outside of the keys")
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _tensor(state: Tensor | str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8) if isinstance(state, str) else state


def as_json(states: list[dict[str, Any]]) -> str:
    """The `rng_state` of several processes: torch's are bytes, NumPy's 624 numbers."""
    return json.dumps(
        states, default=lambda s: s.numpy().tobytes().hex() if torch.is_tensor(s) else s.tolist()
    )


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What is drawn inside this context does not change what is drawn after it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
