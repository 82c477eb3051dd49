"""A second device without one: tensors in main memory that say they lie elsewhere, and refuse to be mixed.

Arithmetic is the CPU's own, so results can be compared; what a GPU would refuse (an operation on tensors of
two devices) is refused, and what would make the CPU wait for it (reading a number) is counted.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("meta")  # the one type that torch lets others give a meaning, without a driver
COPIES = ("aten::copy_", "aten::_to_copy")


class Elsewhere(Tensor):
    """Wraps a tensor in main memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    name = func._schema.name
    if there and name not in COPIES:
        for tensor in tensors:
            index = name.startswith("aten::index") and not tensor.is_floating_point()
            if tensor.dim() and not isinstance(tensor, Elsewhere) and not index:
                raise RuntimeError(f"{name}: tensors on two devices")
            if tensor.device == DEVICE and not isinstance(tensor, Elsewhere):
                raise RuntimeError(f"{name}: a list made into a tensor on the way, which waits for a copy")
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device) == DEVICE
        kwargs = {**kwargs, "device": "cpu"}
    bare = tree_map(lambda value: value.inner if isinstance(value, Elsewhere) else value, (args, kwargs))
    result = func(*bare[0], **bare[1])
    if name.endswith("_") and result is not None:  # in place
        return args[0]
    return tree_map(lambda value: Elsewhere(value) if there and isinstance(value, Tensor) else value, result)


class _Dispatch(TorchDispatchMode):
    """Makes tensors on the pretended device, and counts how often a number is read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func._schema.name == "aten::_local_scalar_dense" and isinstance(args[0], Elsewhere):
            self.waits += 1
        return _run(func, args, kwargs or {})


class _FromLists(TorchFunctionMode):
    """torch.tensor([…], device=…) would make an empty tensor on the device whose name is borrowed."""

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Dispatch]:
    """`DEVICE` can be used as if it were a GPU; yields the counter of `waits`."""
    autocast = torch.autocast

    def known(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", known)
    with ExitStack() as stack:
        counter = stack.enter_context(_Dispatch())
        stack.enter_context(_FromLists())
        yield counter
