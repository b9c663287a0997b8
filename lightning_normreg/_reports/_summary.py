"""What is known of every parameter before training, as a table and in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal

from rich.table import Table
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg._optimizers import NoRule, UpdateRule, update_rule
from lightning_normreg._symmetries import Symmetries, audit_decay, set_names, sets_and_pairs, whole_name
from lightning_normreg._weights import (
    ParameterRole,
    ScaleInvariance,
    Verdict,
    about_masks,
    listed,
    norms_of,
    summarize,
    watch,
    whole_shape,
)
from lightning_normreg.functional._norms import root_mean_square

_WITHOUT_UNITS = ("none", "unknown", "inert")
_COLUMNS = ("parameter", "shape", "role", "units", "eps share", "norm", "radius", "group", "decay", "optimizer")


@dataclass(frozen=True)
class SummaryRow:
    parameter: str  # clean name
    shape: tuple[int, ...]
    role: str  # what it is
    units: str  # its scale-invariant units in words, "none", "unknown", or "inert"
    evidence: str  # where that is from, "" where it is unknown
    eps_share: float | None  # median eps share ρ of the normalizations behind it, None if it was not measured
    norm: float  # root mean square of the units' norms before any projection
    radius: float | None  # at which a projection holds them (root mean square), None for none; NaN if that is not fixed
    group: str  # name or number of its parameter group, "" if no optimizer updates it
    weight_decay: float  # of that group
    lr: float  # of that group
    optimizer: str  # class of its optimizer
    size: int  # number of its entries
    invariant: bool  # whether its units are scale-invariant
    rate_of_one: float | None = None  # share that a decay of 1 takes off per step; None where it is in Adam's gradient
    acts: str = ""  # what its decay does to the function, "" where symmetries are not known
    removable: bool | None = None  # whether its penalty is removable in the limit; None where that is not known
    set: str = ""  # the set that it is scale-invariant together with, if symmetries are known

    def cells(self, audited: bool = False) -> list[str]:
        shape = "×".join(map(str, self.shape))
        units = f"{self.units} ({self.evidence})" if self.evidence and self.units not in _WITHOUT_UNITS else self.units
        units = f"in {self.set}" if self.set and self.units == "none" else units
        share = "" if self.eps_share is None else f"{self.eps_share:.1%}"
        radius = "" if self.radius is None else "not yet" if math.isnan(self.radius) else f"{self.radius:.4g}"
        decay = f"{self.weight_decay:g}" if self.optimizer else ""
        norm, optimizer = f"{self.norm:.4g}", self.optimizer or "frozen"
        cells = [self.parameter, shape, self.role, units, share, norm, radius, self.group, decay, optimizer]
        return [*cells, "acts through others" if "through" in self.acts else self.acts] if audited else cells


def summary_rows(
    named: Sequence[tuple[str, Parameter, ParameterRole]],
    optimizers: Iterable[Optimizer],
    verdict: Verdict,
    held: Mapping[str, tuple[float, float]],
) -> list[SummaryRow]:
    """One row for each parameter.

    The verdict is empty where nothing is known. ``held`` has the norm before the projection, and the radius, of each
    projected parameter.
    """
    groups = {
        p: (str(group.get("name", number)), group, optimizer)
        for optimizer in optimizers
        for number, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    }
    watched = watch(named, ["*"], (), "auto", verdict or None)
    norms = {w.name: float(root_mean_square(found)) for w, found in zip(watched, norms_of(watched), strict=True)}
    rows = []
    for name, parameter, role in named:
        known = verdict.get(name)
        norm, radius = held.get(name) or (norms[name], None)
        label, group, optimizer = groups.get(parameter, ("", {}, None))
        rule = None if optimizer is None else update_rule(optimizer, group)
        lr = group.get("lr", 0.0) if rule is None else rule.lr(group)
        rows.append(
            SummaryRow(
                parameter=name,
                shape=tuple(whole_shape(parameter)),
                role=role.role,
                units=units_in_words(known),
                evidence="" if known is None else known.evidence,
                eps_share=None if known is None else known.rho_median,
                norm=norm,
                radius=radius,
                group=label,
                weight_decay=float(group.get("weight_decay", 0.0)),
                lr=float(lr or 0.0),  # None where the optimizer sets its own
                optimizer=type(optimizer).__name__ if optimizer is not None and parameter.requires_grad else "",
                size=whole_shape(parameter).numel(),
                invariant=known is not None and known.is_invariant,
                rate_of_one=rate_of_one(rule, group, lr),
            )
        )
    return rows


def rate_of_one(rule: UpdateRule | NoRule | None, group: Mapping[str, Any], lr: Any) -> float | None:
    """Share that a decay of 1 takes off in a step, with momentum; None where it is in the gradient, as Adam's."""
    gain = rule.decay_gain(dict(group)) if isinstance(rule, UpdateRule) else None
    return None if gain is None or lr is None else float(lr) * gain


def with_audit(rows: Sequence[SummaryRow], symmetries: Symmetries) -> tuple[list[SummaryRow], list[str]]:
    """The rows with what decay does, and sentences about it."""
    decayed = [row for row in rows if row.optimizer and row.weight_decay > 0]
    # At the start of a warm-up every learning rate is 0; what decay does goes by its share, the same along a schedule.
    rest = not any(row.rate_of_one for row in decayed)
    of_one = {row.parameter: 1.0 if rest and row.rate_of_one == 0 else row.rate_of_one for row in rows}
    rates = {row.parameter: row.weight_decay * (of_one[row.parameter] or 0.0) for row in decayed}
    found = audit_decay(symmetries, rates, {row.parameter: of_one[row.parameter] or row.lr for row in rows})
    through = sorted({row.optimizer for row in decayed if row.rate_of_one is None})
    said = [f"What decay does through the gradient of {listed(through)} is not known here."] if through else []
    if found.sentences and any(row.rate_of_one not in (None, row.lr) for row in decayed):
        said.append("That is of decay that acts at once; in SGD's gradient, momentum spreads it over further steps.")
    sets = {whole_name(name): title for title, s in set_names(symmetries).items() for name in s.exponents}
    labels, removable = found.labels, found.removable
    return [
        replace(row, acts=labels.get(name := row.parameter, ""), removable=removable.get(name), set=sets.get(name, ""))
        for row in rows
    ], [*sets_and_pairs(symmetries), *found.sentences, *found.unequal, *said]


def units_in_words(known: ScaleInvariance | None) -> str:
    """The units of a verdict.

    >>> units_in_words(ScaleInvariance("block", dim=0, block_size=64, slices=((0, 128),)))
    'blocks of 64, slices 0 to 127 only'
    """
    if known is None:
        return "unknown"
    if not known.has_units:
        return known.kind
    words = {"neuron": "each neuron", "column": "each column", "dim": f"each slice of dimension {known.dim}"}
    text = words.get(known.kind, "whole tensor")
    if known.kind == "block":
        text = f"blocks of {known.block_size}" if known.block_size else "blocks of several sizes"
    if known.slices is not None:
        text += ", slices " + ", ".join(f"{start} to {stop - 1}" for start, stop in known.slices) + " only"
    text += f", with {known.needs_bias}" if known.needs_bias else ""
    return text if known.is_invariant else f"{text}, but {'for eps' if known.holds else 'no longer'}"


def summary_table(rows: Sequence[SummaryRow]) -> Table:
    table = Table(title="Before training")
    columns, lines = _cells(rows)
    for column in columns:
        side: Literal["right", "left"] = "right" if column in ("eps share", "norm", "radius", "decay") else "left"
        table.add_column(column, justify=side, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def markdown_summary(rows: Sequence[SummaryRow]) -> str:
    """The rows as a Markdown table, for loggers that take text."""
    columns, cells = _cells(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells)])


def _cells(rows: Sequence[SummaryRow]) -> tuple[list[str], list[list[str]]]:
    """Columns that say something of some row; what decay does has one where it is known."""
    audited = any(row.acts for row in rows)
    lines = [row.cells(audited) for row in rows]
    names = [*_COLUMNS, *(["what decay does"] if audited else [])]
    filled = [name == "parameter" or any(line[i] for line in lines) for i, name in enumerate(names)]
    return list(compress(names, filled)), [list(compress(line, filled)) for line in lines]


def sentences(
    rows: list[SummaryRow],
    verdict: Verdict,
    steps_per_epoch: float,
    clipping: float | None,
    audited: Sequence[str] = (),
    *,
    planned: float = math.inf,
) -> list[str]:
    """What the table means, in plain sentences.

    ``steps_per_epoch`` are the optimizers', inf if unknown; ``clipping`` is the Trainer's ``gradient_clip_val``;
    ``audited`` says what decay does beyond what is scale-invariant by itself; ``planned`` are all steps of the run.
    """
    decayed = [row for row in rows if row.weight_decay > 0 and row.optimizer and row.units != "inert"]
    unknown = [row.parameter for row in decayed if row.units == "unknown"]
    known = [row for row in decayed if row.units != "unknown"]
    if not verdict:
        found = ["Which weights are scale-invariant is not known."]
    elif not any(row.invariant for row in rows):
        found = ["No parameter is scale-invariant by itself."] if audited else [summarize(verdict)]
    elif not decayed:
        found = ["Nothing is decayed, so the norms of scale-invariant weights grow and their effective rates fall."]
    else:
        share = sum(r.size for r in known if r.invariant) / max(1, sum(r.size for r in known))
        rest = [r.parameter for r in known if not r.invariant]
        percent = "more than 99%" if rest and share > 0.995 else f"{share:.0%}"
        found = [f"{percent} of what you decay is scale-invariant: there decay only sets the learning rate."]
        if rest and not audited:
            found.append(f"What it does to {listed(rest, 5)}, `reduce_decay` says.")
    found += audited
    found += [f"Of {listed(unknown, 5)} it is not known yet."] if verdict and unknown else []
    for lr, decay in sorted({(r.lr, r.weight_decay) for r in decayed if r.lr > 0}):
        steps = 1 / (lr * decay)
        found.append(
            f"At lr {lr:g} and decay {decay:g} it acts over 1/(lr·decay) = {steps:.3g} steps"
            + (f", {steps / steps_per_epoch:.3g} epochs" if math.isfinite(steps_per_epoch) else "")
            + (f", {steps / planned:.3g} of the run at this learning rate." if math.isfinite(planned) else ".")
        )
    found += [about_masks(verdict)] if about_masks(verdict) else []
    if clipping:
        found.append(f"Gradients are clipped at {clipping:g}: where that is active, a step no longer grows with them.")
    return found
