"""Selects the parameters that a callback acts on, and the units that they are seen in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch.nn.parameter import Parameter

from lightning_normreg._weights._flat_shards import whole_shape
from lightning_normreg._weights._names import check_globs, select
from lightning_normreg._weights._roles import ParameterRole, is_matrix
from lightning_normreg._weights._sharding import shard_of
from lightning_normreg._weights._verdict import ScaleInvariance, fitted
from lightning_normreg._weights._watched import Part, Watched

UnitArgument = Literal["auto", "neuron", "column", "layer", "set"]
Verdict = Mapping[str, ScaleInvariance]


def check_selection(unit: str, include: Sequence[str] | None, exclude: Sequence[str]) -> None:
    """Raise for an unknown unit, or globs that are no list of strings."""
    if unit not in get_args(UnitArgument):
        raise ValueError(f"`unit` must be one of {', '.join(map(repr, get_args(UnitArgument)))}, got {unit!r}.")
    if include is not None:
        check_globs("include", include)
    check_globs("exclude", exclude)


def watch(
    named: Sequence[tuple[str, Parameter, ParameterRole]],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    unit: UnitArgument = "auto",
    verdict: Verdict | None = None,
) -> list[Watched]:
    """Select parameters: those that ``include`` names, by default weights, embeddings and bare ones, less ``exclude``.

    Of bare parameters those are meant that have two dimensions of more than 1, or scale-invariant units.

    Args:
        named: All parameters, as :func:`named_roles` gives them.
        include: Globs, or None.
        exclude: Globs.
        unit: ``"auto"``: the units that the verdict found, the whole tensor where it found none (rows of an embedding
            with sparse gradients), and neurons where there is no verdict. ``"set"`` is the same here: sets come later.
        verdict: Which units are scale-invariant, if that is known.

    Raises:
        ValueError: If a glob matches nothing, or nothing is left.
        NotImplementedError: If a selected parameter is sharded in a way that is not understood.
    """
    found = {name: (parameter, role) for name, parameter, role in named}
    names = {name: role.aliases for name, (_, role) in found.items()}
    units = {name for name, known in (verdict or {}).items() if known.is_invariant}
    bare = [name for name, (_, role) in found.items() if role.role == "other"]
    # A vector that a layer folds into a matrix is known by its units; where that is all there is, it is looked at.
    default = [name for name, (p, role) in found.items() if is_matrix(role, p) or (name in bare and name in units)]
    default = default or bare
    chosen = select(names, include, exclude, default)
    if not chosen:
        raise ValueError(
            f"`include` and `exclude` must leave at least one parameter of the model, got include={include}, "
            f"exclude={list(exclude)}. By default weights, embeddings and bare matrices are watched, of {len(default)}."
        )
    verdict = None if verdict is None else fitted_to(verdict, named)
    watched = []
    for name in chosen:
        parameter, role = found[name]
        known = None if verdict is None else verdict.get(name)
        parts, bias, invariant = _units(role, unit, known)
        standardized = known is not None and known.standardized
        joined = (found[bias][0],) if bias in found else ()
        for p in (parameter, *joined):
            shard_of(p, name)  # refuses what is spread in a way that is not understood
        watched.append(Watched(name, parameter, role, parts, joined, invariant, standardized))
    return watched


def fitted_to(verdict: Verdict, named: Sequence[tuple[str, Parameter, ParameterRole]]) -> dict[str, ScaleInvariance]:
    """See :func:`fitted`, for the parameters of a model."""
    slices = {}
    for name, parameter, role in named:
        shape = list(whole_shape(parameter))
        if len(shape) > 1:
            shape[role.dim] *= role.groups
        slices[name] = shape
    return fitted(verdict, slices)


def _units(
    role: ParameterRole, unit: UnitArgument, known: ScaleInvariance | None
) -> tuple[tuple[Part, ...], str | None, bool | None]:
    """Parts, bias and invariance of a parameter, from what the user asked for and what is known."""
    if known is None or known.is_unknown:
        return (_asked_for(role, unit),), None, None
    if unit not in ("auto", "set"):
        return (_asked_for(role, unit),), None, _supports(known, role, unit)
    if not known.has_units and role.sparse:  # most rows do not move in a step
        return (_asked_for(role, unit),), None, known.is_invariant
    if not known.has_units or known.kind == "layer":
        return (Part("layer", role.dim, role.groups),), known.needs_bias, known.is_invariant
    dim, groups = known.dim or 0, known.groups
    if known.slices is None:
        return (Part(known.block_size or 1, dim, groups),), known.needs_bias, known.is_invariant
    parts = (Part(known.block_size or stop - start, dim, groups, start, stop) for start, stop in known.slices)
    return tuple(parts), known.needs_bias, known.is_invariant


def _asked_for(role: ParameterRole, unit: UnitArgument) -> Part:
    if unit == "column":  # what one input feeds into all neurons
        return Part("neuron", 1 - role.dim)
    return Part("layer" if unit == "layer" else "neuron", role.dim, role.groups)


def _supports(known: ScaleInvariance, role: ParameterRole, unit: UnitArgument) -> bool:
    """Whether units of the user's choice are scale-invariant: what is so slice by slice is so as a whole."""
    if not known.is_invariant or known.needs_bias or known.slices:
        return False
    if unit == "column":
        return known.dim == 1 - role.dim and known.block_size == 1
    return unit in ("layer", known.kind)
