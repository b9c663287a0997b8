"""The parameters that a callback acts on, each with the units it is seen in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from lightning_normreg._roles import ParameterRole, named_roles
from lightning_normreg._selection import check_globs, select
from lightning_normreg.functional import unit_norms
from lightning_normreg.functional._units import UNITS, Unit

UnitArgument = Literal["auto", "neuron", "layer"]


@dataclass(frozen=True, eq=False)
class Watched:
    """One parameter and its units."""

    name: str
    parameter: Parameter
    role: ParameterRole
    unit: Unit

    def norms(self) -> Tensor:
        """Norm of every unit, shape ``(units,)``."""
        return unit_norms(self.parameter, self.unit, dim=self.role.dim, groups=self.role.groups)


def check_selection(unit: str, include: Sequence[str] | None, exclude: Sequence[str]) -> None:
    """Raise for an unknown unit, or globs that are no list of strings."""
    if unit != "auto" and unit not in UNITS:
        raise ValueError(f"`unit` must be one of 'auto', {', '.join(map(repr, UNITS))}, got {unit!r}.")
    if include is not None:
        check_globs("include", include)
    check_globs("exclude", exclude)


def watch(
    module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str], unit: UnitArgument = "auto"
) -> list[Watched]:
    """Select parameters: those that ``include`` names, by default weights and embeddings, less ``exclude``.

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
    actual: Unit = "neuron" if unit == "auto" else unit
    return [Watched(name, _whole(name, found[name][0]), found[name][1], actual) for name in chosen]


def _whole(name: str, parameter: Parameter) -> Parameter:
    # The norm of a local shard would be a wrong number without any sign of it.
    if hasattr(parameter, "placements") or hasattr(parameter, "_is_flat_param"):
        raise NotImplementedError(
            f"{name!r} is sharded ({type(parameter).__name__}), and norms over shards are not supported yet. "
            "Use strategy='ddp' or a single device."
        )
    return parameter
