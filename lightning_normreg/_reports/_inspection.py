"""Norms of all parameters, and what their optimizer will do to them in the next step, as far as it is known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._optimizers import NoRule, UpdateRule
from lightning_normreg._reports._saved_optimizers import SavedGroup
from lightning_normreg._reports._summary import rate_of_one, units_in_words
from lightning_normreg._symmetries import Symmetries, audit_decay
from lightning_normreg._weights import (
    ParameterRole,
    Verdict,
    Watched,
    is_matrix,
    listed,
    norms_of,
    role_by_shape,
    watch,
)
from lightning_normreg.functional import effective_lr, weight_norm
from lightning_normreg.functional._norms import root_mean_square
from lightning_normreg.steps._formulas import Formulas, Rates


@dataclass(frozen=True)
class InspectedParameter:
    """One parameter; what is not known is None."""

    parameter: str  # clean name
    shape: tuple[int, ...]
    units: str  # its scale-invariant units in words, "none", "inert", or "unknown", where its rows are taken for units
    norm: float  # ‖w‖ of the whole tensor
    unit_norm_rms: float  # n, root mean square of the units' norms
    unit_norm_min: float
    unit_norm_median: float
    unit_norm_max: float
    optimizer: str | None = None  # class of its optimizer
    group: str | None = None  # its parameter group
    lr: float | None = None  # η of the next step
    weight_decay: float | None = None  # λ
    exponent: int | None = None  # p
    effective_lr: float | None = None  # η/n^p; None for what is known not to be scale-invariant
    effective_lr_not_invariant: float | None = None  # the same for that, where it means nothing by itself
    equilibrium_norm: float | None = None  # n at which decay settles
    equilibrium_rotation: float | None = None  # angle per step there, in radians
    acts: str | None = None  # what its decay does to the function, where symmetries are known
    removable: bool | None = None  # whether its penalty is removable in the limit


def as_parameters(tensors: Mapping[str, Tensor]) -> list[tuple[str, Parameter, ParameterRole]]:
    """Tensors of a checkpoint in the form of :func:`named_roles`, as far as names and shapes say what they are."""
    found = []
    for name, tensor in tensors.items():
        parameter = Parameter(tensor, requires_grad=False)
        found.append((name, parameter, ParameterRole(*role_by_shape(name.rpartition(".")[2], parameter), "")))
    return found


def inspect_parameters(
    named: Sequence[tuple[str, Parameter, ParameterRole]],
    owners: Mapping[str, SavedGroup],
    verdict: Verdict,
    held: Collection[str] = (),
) -> tuple[list[InspectedParameter], list[str]]:
    """One row for each parameter, and why cells are empty, in sentences.

    Units are those of the verdict, if there is one. A weight that a projection holds has no equilibrium of decay.
    """
    if not named:
        return [], []
    reasons: dict[str, list[str]] = {}
    watched = watch(named, ["*"], (), "auto", verdict or None)
    rows = []
    for w, norms in zip(watched, norms_of(watched), strict=True):
        ordered = norms.double().sort().values.tolist() or [0.0]
        row: dict[str, Any] = {
            "parameter": w.name,
            "shape": tuple(w.shape),
            "units": units_in_words(verdict.get(w.name)),
            "norm": float(weight_norm(w.parameter.detach())),
            "unit_norm_rms": float(root_mean_square(norms)),
            "unit_norm_min": ordered[0],
            "unit_norm_median": median(ordered),
            "unit_norm_max": ordered[-1],
        }
        if w.name in owners:
            blanks: list[str] = []
            row |= _rates(w, owners[w.name], row["unit_norm_rms"], w.name in held, blanks)
            for blank in blanks:
                reasons.setdefault(blank, []).append(w.name)
        rows.append(InspectedParameter(**row))
    return rows, [f"{listed(names)}: {reason}" for reason, names in reasons.items()]


def with_what_decay_does(
    rows: Sequence[InspectedParameter], owners: Mapping[str, SavedGroup], symmetries: Symmetries
) -> tuple[list[InspectedParameter], list[str]]:
    """The rows with what decay does to the function, and sentences about it."""
    of_one = {row.parameter: _rate_of_one(owners.get(row.parameter), row.lr) for row in rows}
    decayed = {row.parameter: row.weight_decay for row in rows if row.weight_decay}
    rates = {name: decay * (of_one[name] or 0.0) for name, decay in decayed.items()}
    audit = audit_decay(symmetries, rates, {name: rate or 0.0 for name, rate in of_one.items()})
    labels, removable = audit.labels, audit.removable
    told = [replace(r, acts=labels.get(r.parameter), removable=removable.get(r.parameter)) for r in rows]
    said = [*audit.sentences, *audit.unequal]
    if unknown := [name for name in decayed if of_one[name] is None]:
        why = "it acts through the gradient, or it is not known which optimizer this is"
        said.append(f"What decay does to {listed(unknown)} is not known here: {why}.")
    if resting := [name for name in decayed if of_one[name] == 0]:
        said.append(f"At a learning rate of 0, as of {listed(resting)}, decay does nothing in the next step.")
    return told, said


def _rate_of_one(group: SavedGroup | None, lr: float | None) -> float | None:
    found = set() if group is None else {rate_of_one(rule, group.settings, lr) for rule in group.rules}
    return found.pop() if len(found) == 1 else None


def _rates(watched: Watched, group: SavedGroup, norm: float, held: bool, blanks: list[str]) -> dict[str, Any]:
    """What follows from the optimizer's settings; why cells are empty is added to the blanks."""
    rules = [rule for rule in group.rules if isinstance(rule, UpdateRule)]
    whys = [rule.why for rule in group.rules if isinstance(rule, NoRule)]
    lrs = {_number(rule.lr(group.settings)) for rule in rules if rule.lr_key in group.settings}
    lr = lrs.pop() if len(lrs) == 1 else None if rules else _number(group.settings.get("lr"))
    decay = _number(group.settings.get("weight_decay"))
    found: dict[str, Any] = {
        "optimizer": group.optimizer or None,
        "group": group.label,
        "lr": lr,
        "weight_decay": decay,
    }
    if not is_matrix(watched.role, watched.parameter) or lr is None:
        return found
    whys += [rule.note for rule in rules if not rule.lr_is_used]
    exponents = {rule.exponent for rule in rules}
    if whys:
        blanks.append(f"{group.optimizer} {whys[0]}, so there is no lr/n^p.")
        return found
    if len(exponents) == 1:
        (found["exponent"],) = exponents
    if found.get("exponent") and norm > 0:
        key = "effective_lr_not_invariant" if watched.invariant is False else "effective_lr"
        found[key] = float(effective_lr(lr, torch.tensor(norm, dtype=torch.float64), found["exponent"]))
    elif found.get("exponent") == 0:
        blanks.append(f"{group.optimizer} steps in proportion to the weight (p = 0), so there is no lr/n^p.")
    if rules and decay and watched.invariant is not False and not held:
        found |= _equilibrium(watched, rules, group, (lr, decay), blanks)
    return found


def _equilibrium(
    watched: Watched, rules: Sequence[UpdateRule], group: SavedGroup, rates: Rates, blanks: list[str]
) -> dict[str, float]:
    if len({rule.family for rule in rules}) > 1 or not rules[0].family:
        blanks.append(f"the equilibrium of {group.optimizer} with these settings is not known.")
        return {}
    formulas = Formulas(rules[0], group.settings, watched, None)
    found = {}
    for key, formula in (("equilibrium_rotation", formulas.rotation), ("equilibrium_norm", formulas.norm)):
        try:
            found[key] = formula(rates)
        except ValueError as error:
            why = f"no equilibrium is predicted. {error}"
            if "gradient_norm" in str(error):
                what = f"the {key.replace('_', ' ')} of {group.optimizer}"
                why = f"{what} depends on the size of gradients, which is not known here."
            blanks.append(why)
    return found


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def inspection_table(rows: Sequence[InspectedParameter], title: str) -> Table:
    table = Table(title=title, caption=_CAPTION)
    columns: dict[str, Callable[[InspectedParameter], str]] = {
        "parameter": lambda r: r.parameter,
        "shape": lambda r: "×".join(map(str, r.shape)),
        "‖w‖": lambda r: f"{r.norm:.4g}",
        "units: min, median, max": lambda r: (
            f"{r.unit_norm_min:.3g}, {r.unit_norm_median:.3g}, {r.unit_norm_max:.3g}" if len(r.shape) > 1 else ""
        ),
        "n": lambda r: f"{r.unit_norm_rms:.4g}",
        "n*": lambda r: _cell(r.equilibrium_norm),
        "θ*": lambda r: _cell(r.equilibrium_rotation),
        "group": lambda r: r.group or "",
        "lr": lambda r: _cell(r.lr),
        "decay": lambda r: _cell(r.weight_decay),
        "lr/n^p": lambda r: (
            _cell(r.effective_lr) if r.effective_lr_not_invariant is None else f"({r.effective_lr_not_invariant:.4g})"
        ),
    }
    if any(row.acts for row in rows):
        columns["what decay does"] = lambda r: r.acts or ""
        columns["removable"] = lambda r: "" if r.removable is None else str(r.removable).lower()
    if len({(row.optimizer, row.group) for row in rows if row.group is not None}) < 2:
        del columns["group"]
    for name in columns:
        is_text = name in ("parameter", "shape", "group", "what decay does")
        table.add_column(name, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


_CAPTION = (
    "n: root mean square of the units' norms. n*, θ*: norm and rotation per step (radians) at which decay settles. "
    "lr/n^p: effective learning rate of the next step, in brackets where the weight is not scale-invariant."
)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
