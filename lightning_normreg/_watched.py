"""The parameters that a callback acts on, each with the units it is seen in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from lightning_normreg._invariance import ScaleInvariance
from lightning_normreg._roles import ParameterRole, named_roles
from lightning_normreg._selection import check_globs, select
from lightning_normreg.functional._norms import accumulator, row_norms
from lightning_normreg.functional._projection import dead_band, project_views_
from lightning_normreg.functional._units import Unit, View, count_units, over_units, split_units, unit_rows
from lightning_normreg.functional._updates import Step, align_rows, measure_rows

UnitArgument = Literal["auto", "neuron", "column", "layer"]
Verdict = Mapping[str, ScaleInvariance]


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

    def bias_view(self, bias: Tensor, units: int) -> View:
        """The entries of a bias that belong to these units."""
        piece = bias.detach() if self.start is None else bias.detach()[self.start : self.stop]
        return piece.view(units, -1), (0,)


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

    def tensors(self) -> list[Parameter]:
        """The parameter, and the bias that belongs to it."""
        return [self.parameter] if self.bias is None else [self.parameter, self.bias]

    def norms(self) -> Tensor:
        """Norm of every unit, shape ``(units,)``."""
        return torch.cat([row_norms(rows) for rows in self._rows(_itself)])

    def step_from(self, before: Callable[[Parameter], Tensor]) -> Step:
        """What the units have done since ``before``."""
        pairs = zip(self._rows(before), self._rows(_itself), strict=True)
        steps = [measure_rows(start, end) for start, end in pairs]
        return Step(*(torch.cat(v) for v in zip(*((s.norm, s.along, s.across, s.update) for s in steps), strict=True)))

    def alignment(self) -> Tensor:
        """Cosine between every unit and its gradient."""
        pairs = zip(self._rows(_itself), self._rows(_gradient), strict=True)
        return torch.cat([align_rows(weight, gradient) for weight, gradient in pairs])

    def project(self, radius: float | Tensor) -> Tensor:
        """Put every unit at a radius, and return the norms before."""
        norms: list[Tensor] = []
        for part in self.parts:
            views = self._views(part, _itself)
            units = count_units(*views[0])
            start = sum(len(n) for n in norms)
            own = radius[start : start + units] if isinstance(radius, Tensor) and radius.ndim else radius
            norms.append(project_views_(views, own))
        return torch.cat(norms)

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
        longest = max((rows.shape[1] for rows in self._rows(_itself)), default=1)
        return dead_band(self.parameter.dtype, longest)

    def natural_norms(self) -> Tensor:
        """Norm that each unit has when its neurons have norm 1 on average, or, standardized, its entries have.

        The eps of a weight standardization is added to the mean square of a row's entries.
        """
        squares: list[int] = []
        for part in self.parts:
            units = count_units(*part.view(self.parameter))
            size = part.unit if isinstance(part.unit, int) else 1
            slices = self.parameter.shape[self.role.dim] * self.role.groups if self.parameter.ndim > 1 else 1
            size = slices if part.unit == "layer" else size
            squares += [size * (self.parameter.numel() // slices if self.standardized else 1)] * units
        return torch.tensor(squares, dtype=accumulator(self.parameter.dtype)).sqrt()

    def _rows(self, read: Callable[[Parameter], Tensor]) -> list[Tensor]:
        """For each part its units as rows, in the parameter's own order of entries."""
        found = []
        for part in self.parts:
            like = part.view(self.parameter)[0]
            (view, kept), *bias = self._views(part, read)
            found.append(torch.cat([unit_rows(view, kept, like=like), *(v for v, _ in bias)], dim=1))
        return found

    def _views(self, part: Part, read: Callable[[Parameter], Tensor]) -> list[View]:
        view, kept = part.view(read(self.parameter))
        joined = [] if self.bias is None else [part.bias_view(read(self.bias), count_units(view, kept))]
        return [(view, kept), *joined]


def _itself(parameter: Parameter) -> Tensor:
    return parameter.detach()


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def check_selection(unit: str, include: Sequence[str] | None, exclude: Sequence[str]) -> None:
    """Raise for an unknown unit, or globs that are no list of strings."""
    if unit not in get_args(UnitArgument):
        raise ValueError(f"`unit` must be one of {', '.join(map(repr, get_args(UnitArgument)))}, got {unit!r}.")
    if include is not None:
        check_globs("include", include)
    check_globs("exclude", exclude)


def watch(
    module: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    unit: UnitArgument = "auto",
    verdict: Verdict | None = None,
) -> list[Watched]:
    """Select parameters: those that ``include`` names, by default weights and embeddings, less ``exclude``.

    Args:
        module: The module that they belong to.
        include: Globs, or None.
        exclude: Globs.
        unit: ``"auto"``: the units that the verdict found, the whole tensor where it found none, and neurons where
            there is no verdict.
        verdict: Which units are scale-invariant, if that is known.

    Raises:
        ValueError: If a glob matches nothing, or nothing is left.
        NotImplementedError: If a selected parameter is sharded.
    """
    found = {name: (parameter, role) for name, parameter, role in named_roles(module)}
    names = {name: role.aliases for name, (_, role) in found.items()}
    default = [name for name, (_, role) in found.items() if role.role in ("weight", "embedding")]
    chosen = select(names, include, exclude, default)
    if not chosen:
        raise ValueError(
            f"`include` and `exclude` must leave at least one parameter of {type(module).__name__}, got include="
            f"{include}, exclude={list(exclude)}. By default weights and embeddings are watched, of {len(default)}."
        )
    watched = []
    for name in chosen:
        parameter, role = found[name]
        known = None if verdict is None else verdict.get(name)
        parts, bias, invariant = _units(role, unit, known)
        joined = found[bias][0] if bias in found else None
        standardized = known is not None and known.standardized
        watched.append(Watched(name, _whole(name, parameter), role, parts, joined, invariant, standardized))
    return watched


def _units(
    role: ParameterRole, unit: UnitArgument, known: ScaleInvariance | None
) -> tuple[tuple[Part, ...], str | None, bool | None]:
    """Parts, bias and invariance of a parameter, from what the user asked for and what is known."""
    if known is None:
        return (_asked_for(role, unit),), None, None
    if unit != "auto":
        return (_asked_for(role, unit),), None, _supports(known, role, unit)
    if not known.is_invariant or known.kind == "layer":
        return (Part("layer", role.dim, role.groups),), known.needs_bias, known.is_invariant
    dim, groups = known.dim or 0, known.groups
    if known.slices is None:
        return (Part(known.block_size or 1, dim, groups),), known.needs_bias, True
    parts = (Part(known.block_size or stop - start, dim, groups, start, stop) for start, stop in known.slices)
    return tuple(parts), known.needs_bias, True


def _asked_for(role: ParameterRole, unit: UnitArgument) -> Part:
    if unit == "column":  # what one input feeds into all neurons
        return Part("neuron", 1 - role.dim)
    return Part("neuron" if unit == "auto" else unit, role.dim, role.groups)


def _supports(known: ScaleInvariance, role: ParameterRole, unit: UnitArgument) -> bool:
    """Whether units of the user's choice are scale-invariant: what is so slice by slice is so as a whole."""
    if not known.is_invariant or known.needs_bias or known.slices:
        return False
    if unit == "column":
        return known.dim == 1 - role.dim and known.block_size == 1
    return unit in ("layer", known.kind)


def _whole(name: str, parameter: Parameter) -> Parameter:
    # The norm of a local shard would be a wrong number without any sign of it.
    if hasattr(parameter, "placements") or hasattr(parameter, "_is_flat_param"):
        raise NotImplementedError(
            f"{name!r} is sharded ({type(parameter).__name__}), and norms over shards are not supported yet. "
            "Use strategy='ddp' or a single device."
        )
    return parameter
