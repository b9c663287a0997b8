"""The parameters that a callback acts on, each with the units it is seen in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._weights._flat_shards import whole_shape
from lightning_normreg._weights._roles import ParameterRole
from lightning_normreg._weights._sharding import Later, SumOverShards, at_once
from lightning_normreg.functional._norms import accumulator, row_norms, weight_norm
from lightning_normreg.functional._projection import dead_band, project_views_
from lightning_normreg.functional._rotation import Mixture, mix_
from lightning_normreg.functional._turn import Turn, measure_turn
from lightning_normreg.functional._units import Unit, View, count_units, over_units, split_units, unit_rows
from lightning_normreg.functional._updates import Step, align_rows, measure_rows


@dataclass(frozen=True)
class Part:
    """A run of neighbouring slices of a parameter whose units are all of one shape.

    Attributes:
        unit: ``"neuron"``, ``"layer"`` or the number of slices in a unit.
        dim: Dimension of the slices.
        groups: Groups that they are spread over, for transposed convolutions.
        start: First slice, None for all.
        stop: The slice after the last.
    """

    unit: Unit
    dim: int = 0
    groups: int = 1
    start: int | None = None
    stop: int = 0

    def view(self, tensor: Tensor) -> View:
        """The part of a tensor, with its units along whole dimensions."""
        piece = tensor if self.start is None else tensor.narrow(self.dim, self.start, self.stop - self.start)
        return split_units(piece, self.unit, self.dim, self.groups)

    def units(self, shape: torch.Size) -> int:
        """Number of units in a tensor of some shape."""
        if self.unit == "layer" or len(shape) < 2:
            return 1
        slices = shape[self.dim] * self.groups if self.start is None else self.stop - self.start
        return slices if self.unit == "neuron" else slices // self.unit

    def bias_view(self, bias: Tensor, units: int) -> View:
        """The entries of a bias that belong to these units."""
        piece = bias.detach() if self.start is None else bias.detach()[self.start : self.stop]
        return piece.view(units, -1), (0,)


def itself(parameter: Parameter) -> Tensor:
    return parameter.detach()


def gradient_of(parameter: Parameter) -> Tensor:
    """The gradient of a parameter, zero where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@dataclass(frozen=True, eq=False)
class Watched:
    """One parameter and its units.

    Attributes:
        name: Clean name.
        parameter: The parameter.
        role: What it is.
        parts: Its units; entries outside of them are left alone.
        bias: A bias whose entries belong to the units.
        invariant: Whether the units are scale-invariant; None where nobody knows.
        standardized: Whether a normalization divides its rows by their own standard deviation.
    """

    name: str
    parameter: Parameter
    role: ParameterRole
    parts: tuple[Part, ...]
    bias: Parameter | None = None
    invariant: bool | None = None
    standardized: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the whole parameter."""
        return whole_shape(self.parameter)

    def tensors(self) -> list[Parameter]:
        """The parameter, and the bias that belongs to it."""
        return [self.parameter] if self.bias is None else [self.parameter, self.bias]

    def norms(self) -> Tensor:
        """Norm of every unit, shape ``(units,)``; every process must ask."""
        return norms_of([self])[0]

    def units(self) -> int:
        """Number of units."""
        return sum(part.units(self.shape) for part in self.parts)

    def norms_later(self, total: SumOverShards, read: Callable[[Parameter], Tensor] = itself) -> Later[Tensor]:
        """Norm of every unit of what ``read`` gives, such as the gradient."""
        norms = torch.cat([row_norms(rows) for rows in self._rows(read)])
        return lambda: norms

    def whole_norm_later(self, total: SumOverShards, read: Callable[[Parameter], Tensor] = itself) -> Later[Tensor]:
        """Norm of the whole tensor, without the bias and with entries that are in no unit."""
        norm = weight_norm(read(self.parameter))
        return lambda: norm

    def step_later(
        self, total: SumOverShards, before: Callable[[Parameter], Tensor], shrink: float | Tensor = 0.0
    ) -> Later[Step]:
        """What the units have done since ``before``.

        Args:
            total: Takes partial sums.
            before: From a parameter to what this process held of it before.
            shrink: Share of the weight that decay took off, as far as all processes know it.
        """
        pairs = zip(self._rows(before), self._rows(itself), strict=True)
        steps = [measure_rows(start, end) for start, end in pairs]
        parts = zip(*((s.norm, s.along, s.across, s.update) for s in steps), strict=True)
        step = Step(*(torch.cat(values) for values in parts))
        return lambda: step

    def turn_later(
        self, total: SumOverShards, before: Callable[[Parameter], Tensor], shrink: float | Tensor = 0.0
    ) -> Later[Turn]:
        """What the update since ``before`` has done along and across the units; arguments as of :meth:`step_later`."""
        turns = [measure_turn(self._views(part, itself), self._views(part, before)) for part in self.parts]
        turn = Turn.joined(turns)
        return lambda: turn

    def mix(self, mix: Mixture, before: Callable[[Parameter], Tensor]) -> None:
        """Make each unit the mixture of what it was before and of its update."""
        done = 0
        for part in self.parts:
            views = self._views(part, itself)
            units = count_units(*views[0])
            own = mix if len(self.parts) == 1 else Mixture(*(values[done : done + units] for values in mix))
            mix_(views, self._views(part, before), own)
            done += units

    def alignment_later(self, total: SumOverShards) -> Later[Tensor]:
        """Cosine between every unit and its gradient."""
        pairs = zip(self._rows(itself), self._rows(gradient_of), strict=True)
        cosines = torch.cat([align_rows(weight, gradient) for weight, gradient in pairs])
        return lambda: cosines

    def project_later(self, total: SumOverShards, radius: float | Tensor) -> Later[Tensor]:
        """Put every unit at a radius, and return the norms before."""
        norms: list[Tensor] = []
        for part in self.parts:
            views = self._views(part, itself)
            units = count_units(*views[0])
            start = sum(len(n) for n in norms)
            own = radius[start : start + units] if isinstance(radius, Tensor) and radius.ndim else radius
            norms.append(project_views_(views, own))
        return lambda: torch.cat(norms)

    def multiply(self, factors: Tensor, read: Callable[[Parameter], Tensor]) -> None:
        """Multiply the entries of each unit, in tensors that are shaped like its parameters, by the unit's factor."""
        done = 0
        for part in self.parts:
            views = self._views(part, read)
            units = count_units(*views[0])
            for view, kept in views:
                view.mul_(over_units(factors[done : done + units].to(view.dtype), view, kept))
            done += units

    def dead_band(self) -> float:
        """Relative distance from the radius within which a unit counts as being on it; that of the longest unit."""
        return dead_band(self.parameter.dtype, self.longest())

    def longest(self) -> int:
        """Entries of the longest unit."""
        return max((rows.shape[1] for rows in self._rows(itself)), default=1)

    def natural_norms(self) -> Tensor:
        """Norm that each unit has when its neurons have norm 1 on average, or, standardized, its entries have.

        The eps of a weight standardization is added to the mean square of a row's entries.
        """
        squares: list[int] = []
        for part in self.parts:
            slices = self.shape[self.role.dim] * self.role.groups if len(self.shape) > 1 else 1
            size = slices if part.unit == "layer" else 1 if isinstance(part.unit, str) else part.unit
            units = part.units(self.shape)
            squares += [size * (self.shape.numel() // slices if self.standardized else 1)] * units
        return torch.tensor(squares, dtype=accumulator(self.parameter.dtype)).sqrt()

    def _rows(self, read: Callable[[Parameter], Tensor]) -> list[Tensor]:
        """For each part its units as rows, in the parameter's own order of entries."""
        found = []
        for part in self.parts:
            like = part.view(self.parameter)[0]
            (view, kept), *bias = self._views(part, read)
            rows = unit_rows(view, kept, like=like)
            found.append(torch.cat([rows, *(v for v, _ in bias)], dim=1) if bias else rows)
        return found

    def _views(self, part: Part, read: Callable[[Parameter], Tensor]) -> list[View]:
        view, kept = part.view(read(self.parameter))
        joined = [] if self.bias is None else [part.bias_view(read(self.bias), count_units(view, kept))]
        return [(view, kept), *joined]


def norms_of(watched: Sequence[Watched]) -> list[Tensor]:
    """Norm of every unit of some parameters; every process must ask for the same ones."""
    return at_once(lambda w, total: w.norms_later(total), watched)
