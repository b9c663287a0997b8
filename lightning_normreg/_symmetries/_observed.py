"""Scale invariance as seen from gradients of training: weaker evidence than the probe's, for models it cannot ask.

At the weights of a run a sum ``Σ w·g`` may vanish by accident, above all while biases and gains are where they were
initialized. So a weight beside a live bias is only ever accepted together with it, the steps lie apart, and what is
found never changes weights by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_normreg._symmetries._euler import euler_entries, pooled_statistic
from lightning_normreg._symmetries._reasons import explain
from lightning_normreg._symmetries._shape import equal_units
from lightning_normreg._symmetries._slices import Axis, Table, axes, unit_table
from lightning_normreg._symmetries._thresholds import ObserverThresholds
from lightning_normreg._weights import ParameterRole, ScaleInvariance, Shard, summed
from lightning_normreg.functional._device import accumulator

FEWEST_STEPS = 4
"""Steps with a finite gradient below which nothing is said of a weight."""


@dataclass(frozen=True)
class Observed:
    """Sums of ``E = w·g`` of one parameter in one step, or in several stacked in front; on its device."""

    tables: dict[Axis, Table]  # along neurons and columns
    gradient: Tensor  # its norm

    @staticmethod
    def of(weight: Tensor, gradient: Tensor, looked_at: Sequence[Axis], shard: Shard | None = None) -> Observed:
        """Sum over the slices of some axes, in float32 at least; partial sums of a shard, see :meth:`summed`."""
        reached = None
        if gradient.is_sparse:  # by its rows: a dense copy of it may not fit
            reached, gradient = gradient.indices()[0], gradient.values()
        entries = euler_entries(weight if reached is None else weight[reached], gradient, accumulator(weight.dtype))
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=entries.dtype)
        tables = Table.along(entries, looked_at, shard)
        if reached is not None:
            tables |= {a: tables[a].spread(reached, len(weight)) for a in looked_at if a.dim == 0}
        return Observed(tables, norm)

    @staticmethod
    def stack(steps: Sequence[Observed]) -> Observed:
        """Put several steps into one."""
        axes_seen = steps[0].tables if steps else ()
        tables = {axis: Table.stack([step.tables[axis] for step in steps]) for axis in axes_seen}
        return Observed(tables, torch.stack([step.gradient for step in steps]) if steps else torch.zeros(0))

    @staticmethod
    def summed(found: Mapping[str, tuple[Observed, Shard]]) -> dict[str, Observed]:
        """The sums over processes of partial sums, by one reduction for all parameters."""
        parts = [
            (values, shard.groups)
            for seen, shard in found.values()
            for values in (*(v for table in seen.tables.values() for v in table), seen.gradient.square())
        ]
        sums = iter(summed(parts))
        return {
            name: Observed({axis: Table(next(sums), next(sums)) for axis in seen.tables}, next(sums).sqrt())
            for name, (seen, _) in found.items()
        }

    def where(self, steps: Tensor) -> Observed:
        """The steps of a stack that a mask names."""
        tables = {axis: Table(t.sums[steps], t.squares[steps]) for axis, t in self.tables.items()}
        return Observed(tables, self.gradient[steps])


def observed_axes(shape: torch.Size, role: ParameterRole) -> list[Axis]:
    """Neurons and columns: those of larger dimensions (positions in a kernel) are no units of a known layer."""
    return axes(shape, role)[:2]


def observed_verdict(weight: Observed, biases: Mapping[str, Observed], limits: ObserverThresholds) -> ScaleInvariance:
    """The finest units of one parameter whose sums have vanished in all steps.

    Args:
        weight: What was seen of it.
        biases: Name → what was seen, in the same steps, of the biases that may belong to it, likeliest first.
        limits: How small is zero.
    """
    useful = weight.gradient.isfinite() & (weight.gradient > 0)
    steps = int(useful.sum())
    if steps < FEWEST_STEPS:
        reason = f"A gradient reached it in {steps} of the observed steps, too few to say anything."
        return ScaleInvariance("unknown", evidence="observer", reason=reason)
    biases = {name: bias for name, bias in biases.items() if len(bias.gradient)}
    if any(bias.gradient.shape != useful.shape for bias in biases.values()):
        reason = f"It was not seen in the same steps as {', '.join(biases)}, which may belong to it."
        return ScaleInvariance("unknown", evidence="observer", reason=reason)
    biases = {name: bias.where(useful) for name, bias in biases.items()}
    weight = weight.where(useful)
    live = {name: bias for name, bias in biases.items() if (bias.gradient > limits.live * weight.gradient).any()}
    found = _alone(weight, limits.statistic) if not live else _with_bias(weight, live, limits.statistic)
    if found is None:
        return _not_invariant(weight, limits.statistic, live)
    found = explain(found)
    seen = f"Seen from the gradients of {steps} training steps only: weaker evidence than a probe's."
    return replace(found, evidence="observer", reason=f"{found.reason} {seen}")


def unit_statistic(verdict: ScaleInvariance, weight: Observed, bias: Observed | None) -> Tensor:
    """T of the units of a verdict, shape ``()``, on the device."""
    return pooled_statistic(*unit_table(verdict, weight.tables, None if bias is None else bias.tables))


def _alone(weight: Observed, threshold: float) -> ScaleInvariance | None:
    axis, table = next(iter(weight.tables.items()))
    found = _blocks(table, axis, threshold)
    if found is None or found.kind == "layer":
        return _columns(weight, threshold) or found
    return found


def _with_bias(weight: Observed, biases: Mapping[str, Observed], threshold: float) -> ScaleInvariance | None:
    axis, table = next(iter(weight.tables.items()))
    for name, bias in biases.items():
        found = _blocks(table.plus(bias.tables[Axis(0)]), axis, threshold)
        if found is not None:
            return replace(found, needs_bias=name)
    return None


def _blocks(table: Table, axis: Axis, threshold: float) -> ScaleInvariance | None:
    """Neurons, else the smallest equal blocks of them, else the whole tensor."""
    slices = table.sums.shape[1]
    for size in (k for k in range(1, slices + 1) if slices % k == 0):
        pooled = [values.reshape(len(values), -1, size).sum(2) for values in table]
        statistic = float(pooled_statistic(*pooled))
        if statistic < threshold:
            return replace(equal_units(size, slices, axis, is_neuron_axis=True), z=statistic**0.5)
    return None


def _columns(weight: Observed, threshold: float) -> ScaleInvariance | None:
    for axis, table in list(weight.tables.items())[1:]:
        statistic = float(pooled_statistic(*table))
        if statistic < threshold:
            return replace(equal_units(1, table.sums.shape[1], axis, is_neuron_axis=False), z=statistic**0.5)
    return None


def _not_invariant(weight: Observed, threshold: float, live: Mapping[str, Observed]) -> ScaleInvariance:
    whole = [values.sum(1, keepdim=True) for values in next(iter(weight.tables.values()))]
    statistic = float(pooled_statistic(*whole))
    beside = f" It has a live bias, {next(iter(live))}, and could only be so together with it." if live else ""
    reason = (
        f"In training its gradients are not at a right angle to it (T = {statistic:.2g} for the whole tensor; units "
        f"need {threshold:g})."
    )
    return ScaleInvariance("none", z=statistic**0.5, evidence="observer", reason=reason + beside)
