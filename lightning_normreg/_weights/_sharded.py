"""A parameter that is spread over processes, with the same units and the same numbers as on one device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._weights._sharding import Later, Shard, SumOverShards, local, shard_of
from lightning_normreg._weights._watched import Part, Watched, gradient_of, itself
from lightning_normreg.functional._norms import accumulator, weight_norm
from lightning_normreg.functional._projection import Limits, divisors
from lightning_normreg.functional._rotation import Mixture
from lightning_normreg.functional._turn import Turn
from lightning_normreg.functional._updates import Step

_SUM_ROUNDING = 16.0
"""Share, in ε, up to which a difference of sums may be rounding: of them, and of their terms."""


class Piece(NamedTuple):
    """What this process holds of one tensor of a unit.

    Attributes:
        parameter: The tensor.
        shard: How it is spread, None where every process has all of it.
        kept: Dimensions that number its slices.
        units: Number of the unit of each local slice, in the order of these dimensions; -1 for none.
    """

    parameter: Parameter
    shard: Shard | None
    kept: tuple[int, ...]
    units: Tensor


class ShardedWatched(Watched):
    """Norms, steps and projections from sums over local slices, which all processes add up.

    Sums have float32 accuracy: the rotation keeps 2e-6 of itself where decay does not dominate the update, and what
    decay takes off is left out of the sums where it is known.
    """

    def units(self) -> int:
        """Number of units."""
        return self._unit_of_slice[1]

    def norms_later(self, total: SumOverShards, read: Callable[[Parameter], Tensor] = itself) -> Later[Tensor]:
        """Norm of every unit; from the local squares."""
        sums = [
            total.add(self._sum(piece, _wide(local(read(piece.parameter))).square()), piece.shard)
            for piece in self.pieces
        ]
        return lambda: sum_of(sums).sqrt()

    def whole_norm_later(self, total: SumOverShards, read: Callable[[Parameter], Tensor] = itself) -> Later[Tensor]:
        """Norm of the whole tensor."""
        square = total.add(weight_norm(local(read(self.parameter))).square(), self.pieces[0].shard)
        return lambda: square().sqrt()

    def step_later(
        self, total: SumOverShards, before: Callable[[Parameter], Tensor], shrink: float | Tensor = 0.0
    ) -> Later[Step]:
        r"""What the units have done.

        With :math:`d = (b - a) + c\,a`, c the share that decay took off: the sums :math:`\sum a^2`, :math:`\sum ad` and
        :math:`\sum d^2` add over shards, and d, which has little of a, keeps its digits.
        """
        sums = self._step_sums(total, before, shrink)

        def step() -> Step:
            squares, products, rests = sum_of(sums)
            norm = squares.sqrt()
            length = torch.where(norm > 0, norm, 1.0)
            radial = products / length
            across = (rests - radial.square()).clamp_min(0).sqrt()
            update = (across.square() + (radial - shrink * norm).square()).sqrt()
            return Step(norm, norm * (1 - shrink) + radial, across, update)

        return step

    def turn_later(
        self, total: SumOverShards, before: Callable[[Parameter], Tensor], shrink: float | Tensor = 0.0
    ) -> Later[Turn]:
        """Likewise along and across the units; what the sums cannot tell from rounding does not count as across."""
        sums = self._step_sums(total, before, shrink)

        def turn() -> Turn:
            squares, products, rests = sum_of(sums)
            norm = squares.sqrt()
            radial = products / torch.where(norm > 0, norm, 1.0)
            across = rests - radial.square()
            noise = _SUM_ROUNDING * torch.finfo(rests.dtype).eps * rests
            tangent = torch.where(across <= noise, 0.0, across).sqrt()
            return Turn(norm, radial - shrink * norm, tangent)

        return turn

    def mix(self, mix: Mixture, before: Callable[[Parameter], Tensor]) -> None:
        """Make each unit the mixture of what it was before and of its update."""
        for piece in self.pieces:
            entries, start = local(piece.parameter), before(piece.parameter)
            factors = [_over_slices(piece, values, entries) for values in (mix.before, mix.update)]
            alone = _over_slices(piece, mix.alone, entries, outside=True)
            wide, begin = entries.to(mix.update.dtype), start.to(mix.update.dtype)
            mixed = begin.lerp(wide, factors[1]).addcmul_(begin, factors[0])
            entries.copy_(torch.where(alone, wide, mixed))

    def _step_sums(
        self, total: SumOverShards, before: Callable[[Parameter], Tensor], shrink: float | Tensor
    ) -> list[Later[Tensor]]:
        sums = []
        for piece in self.pieces:
            start, end = _wide(before(piece.parameter)), _wide(local(piece.parameter))
            rest = (end - start).add(start * shrink)
            parts = (start.square(), start * rest, rest.square())
            stacked = torch.stack([self._sum(piece, values) for values in parts])
            sums.append(total.add(stacked, piece.shard))
        return sums

    def alignment_later(self, total: SumOverShards) -> Later[Tensor]:
        """Cosine between every unit and its gradient."""
        sums = []
        for piece in self.pieces:
            w, g = _wide(local(piece.parameter)), _wide(local(gradient_of(piece.parameter)))
            stacked = torch.stack([self._sum(piece, values) for values in (w.square(), w * g, g.square())])
            sums.append(total.add(stacked, piece.shard))

        def cosine() -> Tensor:
            weights, products, gradients = sum_of(sums)
            lengths = weights.sqrt() * gradients.sqrt()
            return torch.where(lengths > 0, products.abs() / lengths, 0.0).clamp(max=1.0)

        return cosine

    def project_later(self, total: SumOverShards, radius: float | Tensor) -> Later[Tensor]:
        """Put every unit at a radius; without any communication where each unit lies on one process.

        Then the norms are those of this process's units only.
        """
        here = SumOverShards() if self._units_are_local else total
        norms = self.norms_later(here)

        def project() -> Tensor:
            found = norms()
            divisor = divisors(found, radius, Limits.of(self.parameter.dtype, self.longest()))
            for piece in self.pieces:
                _divide(piece, local(piece.parameter), divisor)
            return found[self.pieces[0].units] if here is not total else found

        return project

    def multiply(self, factors: Tensor, read: Callable[[Parameter], Tensor]) -> None:
        """Multiply the entries of each unit by its factor."""
        for piece in self.pieces:
            _divide(piece, local(read(piece.parameter)), 1 / factors)

    @cached_property
    def pieces(self) -> list[Piece]:
        """What this process holds of the weight, and of its bias."""
        return list(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        unit_of_slice, _ = self._unit_of_slice
        shard = shard_of(self.parameter, self.name)
        if len(self.shape) < 2:
            yield Piece(self.parameter, shard, (0,), unit_of_slice.expand(local(self.parameter).numel()))
        elif shard is not None and shard.entries is not None:
            yield Piece(self.parameter, shard, (0,), unit_of_slice[self._slice_of_entries(shard.entries)])
        elif self._part.groups > 1:
            index = _all_of(self.parameter) if shard is None else shard.index
            yield Piece(self.parameter, shard, (0, 1), unit_of_slice[self._slice_in_groups(*index[:2]).flatten()])
        else:
            index = _all_of(self.parameter) if shard is None else shard.index
            yield Piece(self.parameter, shard, (self._part.dim,), unit_of_slice[index[self._part.dim]])
        if self.bias is not None:
            shard = shard_of(self.bias, self.name)
            if shard is not None and shard.entries is not None:
                (places,) = (torch.arange(*shard.entries, device=local(self.bias).device),)
            else:
                (places,) = _all_of(self.bias) if shard is None else shard.index
            yield Piece(self.bias, shard, (0,), unit_of_slice[places])

    def _slice_in_groups(self, first: Tensor, second: Tensor) -> Tensor:
        """Number of the neuron of a transposed convolution, from its places along the first two dimensions."""
        inside, per_group = self.shape[1], self.shape[0] // self._part.groups
        return first[:, None] // per_group * inside + second[None, :]

    def _slice_of_entries(self, entries: tuple[int, int]) -> Tensor:
        """Number of the slice of each entry of a flat piece."""
        places = torch.arange(*entries, device=local(self.parameter).device)
        dim, strides = self._part.dim, [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        along = places // strides[dim] % self.shape[dim]
        if self._part.groups == 1:
            return along
        per_group = self.shape[0] // self._part.groups
        return places // strides[0] // per_group * self.shape[1] + along

    @property
    def _part(self) -> Part:
        return self.parts[0]

    @cached_property
    def _unit_of_slice(self) -> tuple[Tensor, int]:
        """For each slice of the whole tensor the number of its unit, -1 for none, and how many units there are."""
        slices = self.shape[self._part.dim] * self._part.groups if len(self.shape) > 1 else 1
        units = torch.full((slices,), -1, device=local(self.parameter).device)
        count = 0
        for part in self.parts:
            start, stop = (0, slices) if part.start is None else (part.start, part.stop)
            size = _slices_in(part, stop - start)
            units[start:stop] = count + torch.arange(stop - start, device=units.device) // size
            count += (stop - start) // size
        return units, count

    def longest(self) -> int:
        """Entries of the longest unit, on all processes."""
        slices = len(self._unit_of_slice[0])
        largest = max(
            slices if part.unit == "layer" else 1 if part.unit == "neuron" else part.unit for part in self.parts
        )
        return largest * math.prod(self.shape) // slices + (0 if self.bias is None else largest)

    @cached_property
    def _units_are_local(self) -> bool:
        """Whether no unit is spread over processes, which all of them know from the placements alone."""
        neurons = all(part.unit == "neuron" for part in self.parts) and len(self.shape) > 1 and self._part.groups == 1
        spread = [piece.shard for piece in self.pieces]
        weight, *bias = spread
        alike = all(s is not None and weight is not None and s.groups == weight.groups for s in bias)
        return neurons and alike and (weight is None or weight.split_dims <= {self._part.dim})

    def _sum(self, piece: Piece, values: Tensor) -> Tensor:
        """Sum of the local values of each unit, shape ``(units,)``."""
        others = [d for d in range(values.ndim) if d not in piece.kept]
        slices = values.sum(others).flatten() if others else values.flatten()
        mine = piece.units >= 0
        if self.units() == 1:
            return torch.where(mine, slices, 0.0).sum().reshape(1)
        sums = slices.new_zeros(self.units() + 1)  # the last one is for slices that are in no unit
        return sums.index_add_(0, torch.where(mine, piece.units, self.units()), slices)[:-1]


def _slices_in(part: Part, slices: int) -> int:
    """Slices in one unit, of which there are so many in all."""
    return slices if part.unit == "layer" else 1 if part.unit == "neuron" else part.unit


def sum_of(parts: list[Later[Tensor]]) -> Tensor:
    """Sum of the sums of a weight and its bias."""
    first, *rest = [part() for part in parts]
    for other in rest:
        first = first + other
    return first


def _wide(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else tensor
    return real.to(accumulator(real.dtype))


def _all_of(parameter: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.arange(size, device=parameter.device) for size in parameter.shape)


def _over_slices(piece: Piece, values: Tensor, entries: Tensor, outside: float = 0.0) -> Tensor:
    """One value for each unit, shaped to broadcast against the local entries; another for what is in no unit."""
    of_slice = torch.where(piece.units >= 0, values[piece.units.clamp_min(0)], outside)
    return of_slice.reshape([entries.shape[d] if d in piece.kept else 1 for d in range(entries.ndim)])


def _divide(piece: Piece, entries: Tensor, divisor: Tensor) -> None:
    shaped = _over_slices(piece, divisor, entries, outside=1.0)
    if entries.dtype == shaped.dtype:
        entries.div_(shaped)
    else:
        entries.copy_(entries.to(shaped.dtype) / shaped)
