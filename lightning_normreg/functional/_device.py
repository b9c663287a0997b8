"""Which way of computing suits a device, and memory that is kept for the next time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Literal

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

Way = Literal["host", "wide", "narrow"]
"""``"host"``: values can be read at once, so that what is rare may take a detour; ``"wide"``: a read would wait for the
device, so there are no detours, and sums are in float64; ``"narrow"``: the same without float64."""

BLOCK = {"host": 2**17, "wide": 2**22, "narrow": 2**22}
"""Entries to work on at a time: what a cache holds, or what is no burden on a device's memory."""

_kept = local()


def way_of(tensor: Tensor) -> Way:
    """The way to compute with a tensor."""
    pretended: Way | None = None if torch.compiler.is_compiling() else getattr(_kept, "pretended", None)
    if pretended is not None:
        return pretended
    ways: dict[str, Way] = {"cpu": "wide" if is_followed(tensor) else "host", "mps": "narrow"}
    return ways.get(tensor.device.type, "wide")


@contextmanager
def as_on(way: Way) -> Iterator[None]:
    """Compute on the CPU as if it were another device, for tests that count what is done there."""
    before = getattr(_kept, "pretended", None)
    _kept.pretended = way
    try:
        yield
    finally:
        _kept.pretended = before


def is_transformed(*tensors: Tensor) -> bool:
    """Whether autograd or ``torch.func`` follows what is done with tensors."""
    return (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) or any(map(is_wrapped, tensors))


def is_wrapped(tensor: Tensor) -> bool:
    """Whether ``torch.func`` looks at it; of code that is compiled there is nothing to be asked."""
    return not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor)


def is_followed(*tensors: Tensor) -> bool:
    """Whether they do or a compiler does: none of them sees what is written into buffers, nor can values be read."""
    return torch.compiler.is_compiling() or is_transformed(*tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type that entries are summed in: float32 for anything narrower, else the type itself."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def number_type(tensor: Tensor) -> torch.dtype:
    """Type of numbers of which there is one for each unit: float64 where the device has it."""
    return torch.float32 if way_of(tensor) == "narrow" else torch.float64


def sum_type(tensor: Tensor) -> torch.dtype:
    """Type that sums over entries are made in."""
    return torch.float64 if way_of(tensor) == "wide" else accumulator(tensor.dtype)


def scratch(name: str, like: Tensor, entries: int, dtype: torch.dtype) -> Tensor:
    """Flat memory for temporaries, the same each time: memory that goes back to the system costs a page fault."""
    buffers: dict[object, Tensor] = _kept.__dict__.setdefault("buffers", {})
    key = (name, like.device, dtype)
    if key not in buffers or buffers[key].numel() < entries:
        with torch.inference_mode(mode=False):  # what is made in it cannot be written to outside of it
            buffers[key] = torch.empty(entries, dtype=dtype, device=like.device)
    return buffers[key][:entries]
