"""Sums over parameters that are spread over processes: local parts, and one all-reduce for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_normreg._weights._flat_shards import is_flat, known_piece


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that this process holds: some slices of each dimension."""

    shape: torch.Size  # of the whole tensor
    index: tuple[Tensor, ...]  # for each dimension the places of the local slices in the whole tensor
    groups: tuple[dist.ProcessGroup, ...]  # over which it is spread; a sum goes through each
    split_dims: frozenset[int]  # dimensions along which it is
    # In place of `index` for the pieces of FSDP's first version: first entry, in the tensor's own order, and end.
    entries: tuple[int, int] | None = None

    def place(self) -> int:
        """Number of this part among those of the tensor: the same for processes that hold copies of one part."""
        number = 0
        for group in self.groups:
            number = number * dist.get_world_size(group) + dist.get_rank(group)
        return number

    def slices(self, dim: int, groups: int = 1) -> tuple[tuple[int, ...], Tensor]:
        """Dimensions of what is held that run over slices of the whole tensor, and the numbers of these slices.

        Slices are those along ``dim``; with ``groups`` the neurons of a transposed convolution, which are spread over
        dimension 0 as well.
        """
        if self.entries is None:
            first, along = self.index[0], self.index[dim]
            kept = (dim,) if groups == 1 else (0, 1)
        else:
            places = torch.arange(*self.entries)
            stride = self.shape[dim + 1 :].numel()
            along, first = places // stride % self.shape[dim], places // self.shape[1:].numel()
            kept = (0,)
        if groups > 1:
            first = first if kept == (0,) else first[:, None]
            along = first // (self.shape[0] // groups) * self.shape[1] + along
        return kept, along.flatten()


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds a part of the tensor only, or may do so."""
    return hasattr(parameter, "placements") or is_flat(parameter)


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, or the tensor itself."""
    detached = tensor.detach()
    entries: Tensor = detached.to_local() if hasattr(detached, "placements") else detached
    return entries


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


def spread_shards(named: Iterable[tuple[str, Tensor]]) -> dict[str, Shard]:
    """Name → how it is spread, of those of some parameters that are."""
    shards = ((name, shard_of(p, name)) for name, p in named if is_sharded(p))
    return {name: shard for name, shard in shards if shard is not None and (shard.groups or shard.entries)}


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


def summed(
    parts: Sequence[tuple[Tensor, tuple[dist.ProcessGroup, ...]]],
) -> list[Tensor]:
    """Partial sums of all processes added up, in one all-reduce for each process group, that is dimension of the mesh.

    Every process must give the same parts in the same order: what is given never depends on local values.

    Args:
        parts: Partial sums of one type and device, each with the groups that it is spread over.
    """
    values = [part for part, _ in parts]
    for group in dict.fromkeys(group for _, groups in parts for group in groups):
        mine = [place for place, (_, groups) in enumerate(parts) if group in groups]
        flat = torch.cat([values[place].flatten() for place in mine])
        dist.all_reduce(flat, group=group)
        for place, whole in zip(mine, torch.split(flat, [values[place].numel() for place in mine]), strict=True):
            values[place] = whole.reshape(values[place].shape)
    return values
