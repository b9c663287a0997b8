"""Sums over parameters that are spread over processes: local parts, and one all-reduce for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_normreg._compat import is_named
from lightning_normreg._weights._flat_shards import is_flat, known_piece


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that this process holds: some slices of each dimension.

    Attributes:
        shape: Of the whole tensor.
        index: For each dimension the places of the local slices in the whole tensor.
        groups: Process groups over which the tensor is spread; a sum is complete when it has gone through each.
        split_dims: Dimensions along which it is.
        entries: Instead of ``index``, for the pieces of FSDP's first version: first local entry and the one after the
            last, counted in the tensor's own order.
    """

    shape: torch.Size
    index: tuple[Tensor, ...]
    groups: tuple[dist.ProcessGroup, ...]
    split_dims: frozenset[int]
    entries: tuple[int, int] | None = None


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds a part of the tensor only, or may do so."""
    return hasattr(parameter, "placements") or is_flat(parameter)


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, or the tensor itself."""
    detached = tensor.detach()
    entries: Tensor = detached.to_local() if hasattr(detached, "placements") else detached
    return entries


def reshard(model: nn.Module) -> None:
    """Let FSDP forget the whole weights that it keeps after a validation: they would hide what is written to shards."""
    for part in model.modules():
        handle: Any = getattr(part, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if is_named(part, "FSDPModule"):
            part.reshard()  # type: ignore[operator]
        elif is_named(part, "FullyShardedDataParallel") and hasattr(flat, "_local_shard"):
            handle.reshard(True)  # before the first forward pass there is nothing to forget


def shard_of(parameter: Any, name: str) -> Shard | None:
    """How a parameter is spread, None for one that is not.

    Raises:
        NotImplementedError: If it is spread in a way that is not understood.
    """
    if is_flat(parameter):
        piece = known_piece(parameter, name)
        dims = frozenset(range(len(piece.shape)))
        return Shard(piece.shape, (), piece.groups, dims, (piece.start, piece.stop))
    if not hasattr(parameter, "placements"):
        return None
    mesh, placements = parameter.device_mesh, parameter.placements
    split = {d: p.dim for d, p in enumerate(placements) if hasattr(p, "dim")}
    if any(p.is_partial() for p in placements):
        raise NotImplementedError(f"{name!r} must not be a partial sum, got placements {placements}.")
    return Shard(
        shape=parameter.shape,
        index=_places(parameter),
        groups=tuple(mesh.get_group(d) for d in split),
        split_dims=frozenset(split.values()),
    )


def _places(parameter: Any) -> tuple[Tensor, ...]:
    """Global index of the local slices of each dimension."""
    mesh = parameter.device_mesh
    # A strided shard splits what later dimensions of the mesh have split already (FSDP over tensor parallel).
    order = sorted(range(mesh.ndim), key=lambda d: hasattr(parameter.placements[d], "split_factor"))
    found = []
    for dim, size in enumerate(parameter.shape):
        numbers = torch.arange(size, device=local(parameter).device)
        for d in order:
            if getattr(parameter.placements[d], "dim", None) == dim:
                chunks = torch.chunk(numbers, mesh.size(d))
                place = mesh.get_local_rank(d)
                numbers = chunks[place] if place < len(chunks) else numbers[:0]
        found.append(numbers)
    return tuple(found)


S = TypeVar("S")
T = TypeVar("T")
Later = Callable[[], T]
"""A value that is there once the sums that it depends on have been reduced."""


def at_once(ask: Callable[[S, SumOverShards], Later[T]], things: Sequence[S]) -> list[T]:
    """What ``ask`` gives for each of some things, with one reduction for all of them."""
    total = SumOverShards()
    values = [ask(thing, total) for thing in things]
    total.reduce()
    return [value() for value in values]


class SumOverShards:
    """Adds up partial sums of all processes, in one all-reduce for each process group, that is dimension of the mesh.

    Every process must add the same pieces in the same order: what is added never depends on local values.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[Tensor, tuple[dist.ProcessGroup, ...]]] = []

    def add(self, partial: Tensor, shard: Shard | None) -> Later[Tensor]:
        """Take a partial sum, or a whole one; what is returned gives the whole one, after :meth:`reduce`."""
        if shard is None or not shard.groups:
            return lambda: partial
        place = len(self._pieces)
        self._pieces.append((partial, shard.groups))
        return lambda: self._pieces[place][0]

    def reduce(self) -> None:
        """Let all processes add their parts."""
        for group in dict.fromkeys(group for _, groups in self._pieces for group in groups):
            mine = [place for place, (_, groups) in enumerate(self._pieces) if group in groups]
            kinds = {(self._pieces[place][0].dtype, self._pieces[place][0].device): None for place in mine}
            for kind in kinds:  # one, but for models of several types
                self._reduce([p for p in mine if (self._pieces[p][0].dtype, self._pieces[p][0].device) == kind], group)

    def _reduce(self, places: list[int], group: dist.ProcessGroup) -> None:
        parts = [self._pieces[place][0] for place in places]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=group)
        wholes = torch.split(flat, [part.numel() for part in parts])
        for place, part, whole in zip(places, parts, wholes, strict=True):
            self._pieces[place] = (whole.reshape(part.shape), self._pieces[place][1])
