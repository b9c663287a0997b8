"""The parameters that a callback acts on, each with the units it is seen in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._weights._flat_shards import whole_shape
from lightning_normreg._weights._names import counted, listed
from lightning_normreg._weights._roles import ParameterRole
from lightning_normreg.functional._device import accumulator
from lightning_normreg.functional._projection import dead_band
from lightning_normreg.functional._units import Unit, View, split_units


@dataclass(frozen=True)
class Part:
    """A run of neighbouring slices of a parameter whose units are all of one shape."""

    unit: Unit  # "neuron", "layer" or the number of slices in a unit
    dim: int = 0  # dimension of the slices
    groups: int = 1  # groups that they are spread over, for transposed convolutions
    start: int | None = None  # first slice, None for all
    stop: int = 0  # the slice after the last

    def view(self, tensor: Tensor) -> View:
        """The part of a tensor, with its units along whole dimensions."""
        piece = tensor if self.start is None else tensor.narrow(self.dim, self.start, self.stop - self.start)
        return split_units(piece, self.unit, self.dim, self.groups)

    def slices(self, shape: torch.Size) -> tuple[int, int]:
        """First slice in a tensor of some shape, and the one after the last."""
        whole = shape[self.dim] * self.groups if len(shape) > 1 else 1
        return (0, whole) if self.start is None else (self.start, self.stop)

    def size(self, shape: torch.Size) -> int:
        """Slices in one unit."""
        start, stop = self.slices(shape)
        return stop - start if self.unit == "layer" else 1 if self.unit == "neuron" else self.unit

    def units(self, shape: torch.Size) -> int:
        """Number of units in a tensor of some shape."""
        start, stop = self.slices(shape)
        return (stop - start) // self.size(shape)


def in_words(watched: Sequence[Watched]) -> str:
    """How many weights there are, and which sets."""
    sets = [f"{w.name} ({len(w.members)} tensors)" for w in watched if w.members]
    weights = len(watched) - len(sets)
    together = f"the {'sets' if len(sets) > 1 else 'set'} {listed(sets, 3)}"
    return " and ".join([counted(weights, "weight")] * (weights > 0 or not sets) + [together] * bool(sets))


@dataclass(frozen=True, eq=False)
class Watched:
    """One parameter and its units, to which entries of further tensors may belong."""

    name: str  # clean name
    parameter: Parameter  # the parameter
    role: ParameterRole  # what it is
    parts: tuple[Part, ...]  # its units; entries outside of them are left alone
    # tensors that belong to the units: as a whole where these are one unit, or a bias with an entry for each slice
    joined: tuple[Parameter, ...] = ()
    invariant: bool | None = None  # whether the units are scale-invariant; None where nobody knows
    standardized: bool = False  # whether a normalization divides its rows by their own standard deviation
    members: tuple[Watched, ...] = ()  # of a set, which is one unit, the weights in it; the first stands for it above

    @property
    def shape(self) -> torch.Size:
        """Of the whole parameter."""
        return whole_shape(self.parameter)

    @property
    def key(self) -> tuple[object, ...]:
        """The same for whoever watches the same units of the same tensors."""
        return (*(m.key for m in self.members), "set") if self.members else (*map(id, self.tensors()), self.parts)

    def tensors(self) -> list[Parameter]:
        """The parameter, and what belongs to its units; all of a set."""
        return [p for m in self.members for p in m.tensors()] if self.members else [self.parameter, *self.joined]

    def shapes(self) -> list[torch.Size]:
        """Of the whole parameter, or of all the parameters in a set."""
        return [shape for m in self.members for shape in m.shapes()] if self.members else [self.shape]

    def entries(self) -> int:
        """Entries in all units, on all processes."""
        if self.members:
            return sum(m.entries() for m in self.members)
        share = sum(stop - start for start, stop in (part.slices(self.shape) for part in self.parts)) / self.slices()
        return round(share * sum(whole_shape(p).numel() for p in self.tensors()))

    def units(self) -> int:
        """Number of units."""
        return sum(part.units(self.shape) for part in self.parts)

    def is_one_unit(self) -> bool:
        """Whether all of it is one unit, and one tensor but for what is joined to it."""
        return not self.members and len(self.parts) == 1 and self.parts[0].start is None and self.units() == 1

    def longest(self) -> int:
        """Entries of the longest unit, on all processes."""
        if self.members or self.is_one_unit():
            return self.entries()
        largest = max(part.size(self.shape) for part in self.parts)
        return largest * (math.prod(self.shape) // max(1, self.slices()) + len(self.joined))

    def dead_band(self) -> float:
        """Relative distance from the radius within which a unit counts as being on it; that of the longest unit."""
        return dead_band(self.parameter.dtype, self.longest())

    def natural_norms(self) -> Tensor:
        """Norm that each unit has when its neurons have norm 1 on average, or, standardized, its entries have.

        The eps of a weight standardization is added to the mean square of a row's entries.
        """
        squares: list[int] = []
        for part in self.parts:
            slices = self.shape[self.role.dim] * self.role.groups if len(self.shape) > 1 else 1
            size = slices if part.unit == "layer" else 1 if isinstance(part.unit, str) else part.unit
            entries = self.shape.numel() // slices if self.standardized else 1
            squares += [size * entries] * part.units(self.shape)
        return torch.tensor(squares, dtype=accumulator(self.parameter.dtype)).sqrt()

    def slices(self) -> int:
        """Slices of the whole tensor along the dimension of its units."""
        part = self.parts[0]
        return self.shape[part.dim] * part.groups if len(self.shape) > 1 else 1

    def unit_of_slice(self) -> Tensor:
        """For each slice of the whole tensor the number of its unit, -1 for none."""
        units = torch.full((self.slices(),), -1)
        done = 0
        for part in self.parts:
            start, stop = part.slices(self.shape)
            units[start:stop] = done + torch.arange(stop - start) // part.size(self.shape)
            done += part.units(self.shape)
        return units
