"""Which way of computing suits a device, and memory that is kept for the next time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Literal

import torch
from torch import Tensor

Way = Literal["host", "wide", "narrow"]
"""``"host"``: values can be read at once, so that what is rare may take a detour; ``"wide"``: a read would wait for the
device, so there are no detours, and sums are in float64; ``"narrow"``: the same without float64."""

BLOCK = {"host": 2**17, "wide": 2**22, "narrow": 2**22}
"""Entries to work on at a time: what a cache holds, or what is no burden on a device's memory."""

_kept = local()


def way_of(tensor: Tensor) -> Way:
    """The way to compute with a tensor."""
    pretended: Way | None = getattr(_kept, "pretended", None)
    if pretended is not None:
        return pretended
    return {"cpu": "host", "mps": "narrow"}.get(tensor.device.type, "wide")  # type: ignore[return-value]


@contextmanager
def as_on(way: Way) -> Iterator[None]:
    """Compute on the CPU as if it were another device, for tests that count what is done there."""
    before = getattr(_kept, "pretended", None)
    _kept.pretended = way
    try:
        yield
    finally:
        _kept.pretended = before


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type that entries are summed in: float32 for anything narrower, else the type itself."""
    real = dtype.to_real()
    return torch.float64 if real == torch.float64 else torch.float32


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
        buffers[key] = torch.empty(entries, dtype=dtype, device=like.device)
    return buffers[key][:entries]
