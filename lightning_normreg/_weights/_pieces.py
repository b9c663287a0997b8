"""Where the entries of units lie on this process: local parts of tensors, each row in the place of a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._weights._sharding import Shard, is_sharded, local, shard_of
from lightning_normreg._weights._watched import Watched
from lightning_normreg.functional._units import View, unit_rows

See = Callable[[Tensor], View]
"""From what a process holds of a tensor to a view of it, and the dimensions of that view that number its rows."""


@dataclass
class Piece:
    """Some rows of what this process holds of a tensor."""

    parameter: Parameter  # the tensor
    see: See  # how its rows are seen
    units: Tensor  # for each row the number of its unit in the weight, -1 for none
    is_own: bool = True  # whether the tensor is the weight itself, and not joined to it
    mine: tuple[dist.ProcessGroup, ...] = ()  # process groups over which its tensor is spread
    counts: bool = True  # whether sums over it are added: one process does that for what several have
    _seen: dict[str, tuple[int, View, Tensor]] = field(default_factory=dict)

    def counts_in(self, groups: tuple[dist.ProcessGroup, ...]) -> bool:
        """Whether this process adds it where sums go through some groups, in which all may have the same of it."""
        return all(dist.get_rank(group) == 0 for group in groups if group not in self.mine)

    def now(self) -> tuple[View, Tensor]:
        """View and rows of the parameter as it stands."""
        if type(self.parameter) is Parameter:  # what it holds is not looked for anew in each step
            return self.look("now", self.parameter)
        return self.look("now", local(self.parameter))

    def look(self, which: str, tensor: Tensor) -> tuple[View, Tensor]:
        """View and rows of a tensor that is shaped like what is held of the parameter; kept while it stays in place."""
        address, seen = tensor.data_ptr(), self._seen.get(which)
        if seen is None or seen[0] != address:
            view, kept = self.see(tensor.detach())
            rows = unit_rows(view, kept)
            seen = (address, (view, kept), rows)
            if rows.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
                self._seen[which] = seen
        return seen[1], seen[2]

    def like(self, tensor: Tensor) -> Tensor:
        """Rows of another tensor, entries in the order of the parameter's."""
        (own, _), _ = self.now()
        view, kept = self.see(tensor.detach())
        return unit_rows(view, kept, like=own)


def groups_of(watched: Watched) -> tuple[dist.ProcessGroup, ...]:
    """Process groups over which the units of a weight are spread, in the order in which sums go through them."""
    shards = [shard_of(p, watched.name) for p in watched.tensors() if is_sharded(p)]
    return tuple(dict.fromkeys(group for shard in shards if shard is not None for group in shard.groups))


def lies_whole(watched: Watched) -> bool:
    """Whether no unit is spread over processes, which all of them know from the placements alone."""
    if watched.members:
        return not groups_of(watched)
    shards = [shard_of(p, watched.name) if is_sharded(p) else None for p in watched.tensors()]
    own = shards[0]
    if own is None or own.entries is not None:
        return not any(shard is not None and shard.groups for shard in shards)
    neurons = all(part.unit == "neuron" and part.groups == 1 for part in watched.parts) and len(watched.shape) > 1
    alike = all(s is not None and s.groups == own.groups for s in shards)
    return not own.groups or (neurons and alike and own.split_dims <= {watched.parts[0].dim})


def pieces_of(watched: Watched, groups: tuple[dist.ProcessGroup, ...] | None = None) -> list[Piece]:
    """All that this process holds of the units of a weight, which are spread over some process groups."""
    groups = groups_of(watched) if groups is None else groups
    if watched.members:
        found = [piece for member in watched.members for piece in pieces_of(member, groups)]
        return [replace(piece, units=piece.units.clamp(max=0)) for piece in found]
    found = []
    for parameter in watched.tensors():
        is_own = parameter is watched.parameter
        shard = shard_of(parameter, watched.name) if is_sharded(parameter) else None
        for see, units in _rows(watched, parameter, shard, is_own):
            piece = Piece(parameter, see, units, is_own, () if shard is None else shard.groups)
            found.append(replace(piece, counts=piece.counts_in(groups)))
    return found


def _rows(watched: Watched, parameter: Parameter, shard: Shard | None, is_own: bool) -> Iterator[tuple[See, Tensor]]:
    if watched.is_one_unit():
        yield _as_one_row, torch.zeros(1, dtype=torch.long)
    elif shard is None:
        yield from _whole(watched, is_own)
    elif shard.entries is not None:
        yield from _flat(watched, shard, shard.entries, is_own)
    else:
        part = watched.parts[0]
        kept, slices = shard.slices(part.dim, part.groups) if is_own else shard.slices(0)
        yield _along(kept), watched.unit_of_slice()[slices.cpu()]


def _whole(watched: Watched, is_own: bool) -> Iterator[tuple[See, Tensor]]:
    """Each part has its units as rows; what lies between the parts is a row that is in no unit."""
    done, last, end = 0, 0, watched.slices()
    for part in watched.parts:
        start, stop = part.slices(watched.shape)
        units = part.units(watched.shape)
        if is_own and start > last:
            yield replace(part, unit="layer", start=last, stop=start).view, torch.tensor([-1])
        yield (part.view if is_own else _entries(start, stop, units)), torch.arange(done, done + units)
        done, last = done + units, stop
    if is_own and last < end:
        yield replace(watched.parts[0], unit="layer", start=last, stop=end).view, torch.tensor([-1])


def _flat(watched: Watched, shard: Shard, entries: tuple[int, int], is_own: bool) -> Iterator[tuple[See, Tensor]]:
    """A run of entries in the tensor's own order: the end of a row, whole rows, and the start of one."""
    units, part, (start, stop) = watched.unit_of_slice(), watched.parts[0], entries
    length = watched.shape.numel() // watched.shape[0] if is_own else 1
    if is_own and (part.dim or part.groups > 1):
        kept, slices = shard.slices(part.dim, part.groups)
        yield _along(kept), units[slices]
        return
    first = min(-(-start // length) * length, stop)
    last = max(stop // length * length, first)
    for low, high in ((start, first), (first, last), (last, stop)):
        if high > low:
            rows = (high - low) // length or 1
            yield _entries(low - start, high - start, rows), units[low // length : low // length + rows]


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _as_one_row(tensor: Tensor) -> View:
    return real(tensor), ()


def _along(kept: tuple[int, ...]) -> See:
    return lambda tensor: (real(tensor), kept)


def _entries(start: int, stop: int, rows: int) -> See:
    return lambda tensor: (real(tensor)[start:stop].reshape(rows, -1), (0,))
