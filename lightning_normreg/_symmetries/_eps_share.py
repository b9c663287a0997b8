r"""The eps share ρ = eps/(var + eps) that the normalizations behind each unit have at the user's own weights.

Which normalizations are behind a unit follows from the same relation that finds the units: without eps, everything is
homogeneous of degree 0 in a scale-invariant unit w, except for the variances v that it feeds before they are normalized
away. With one constant c per entry of all variances,

.. math:: \Phi_c = \sum_j c_j \tfrac12 \log v_j \quad\Rightarrow\quad \langle w, \partial\Phi_c/\partial w\rangle =
    \sum_{j \text{ behind } w} c_j .

Two backward passes, with c = ρ and with c = 1, give the mean ρ that each unit meets. In place each has a forward
pass of its own, because sharded weights are gone after the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_normreg._symmetries._call import Call
from lightning_normreg._symmetries._dispatch import is_eps
from lightning_normreg._symmetries._euler import EulerSums, euler_sums, wide
from lightning_normreg._symmetries._losses import Gradients, Losses, ProbeError
from lightning_normreg._symmetries._slices import Axis, Table, unit_table
from lightning_normreg._weights import ParameterRole, ScaleInvariance

T = TypeVar("T")


class _Reading(NamedTuple):
    """What one normalization is about to divide by the root of, in the graph, and its eps."""

    variance: Tensor
    eps: float


class NormReader(TorchFunctionMode):
    """Above autograd: collects the variance and eps of every normalization, of torch or written by hand."""

    def __init__(self, narrow_eps: float) -> None:
        super().__init__()
        self.readings: list[_Reading] = []
        self._narrow_eps = narrow_eps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            self._read_norm(func, args, kwargs)
        elif func in _ADDS and len(args) > 1 and isinstance(args[0], Tensor) and is_eps(args[1]):
            variance = args[0].clone() if func in _IN_PLACE else args[0]
            self.readings.append(_Reading(variance, args[1]))
        return func(*args, **kwargs)

    def _read_norm(self, func: Any, args: Any, kwargs: Any) -> None:
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        # Checkpointing counts the tensors that are saved, and these are not there when it recomputes.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            variance = _variance(func, bound.arguments)
        if variance is not None:
            eps = bound.arguments["eps"]
            self.readings.append(_Reading(variance, self._narrow_eps if eps is None else eps))


def _variance(func: Any, a: Mapping[str, Any]) -> Tensor | None:
    """What a normalization of torch measures, from its arguments; None where it uses running statistics."""
    x: Tensor = a["input"]
    if func is F.group_norm:
        return x.reshape(len(x), a["num_groups"], -1).var(2, correction=0)
    if func in (F.layer_norm, F.rms_norm):
        dims = list(range(-len(a["normalized_shape"]), 0))
        return x.square().mean(dims) if func is F.rms_norm else x.var(dims, correction=0)
    if func is F.batch_norm:
        return x.var([0, *range(2, x.ndim)], correction=0) if a["training"] else None
    return x.var(list(range(2, x.ndim)), correction=0) if a["use_input_stats"] else None


_NORMS = (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm)
_SIGNATURES = {func: inspect.signature(func) for func in _NORMS}
_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *_IN_PLACE}


def with_eps_shares(
    call: Call,
    verdicts: Mapping[str, ScaleInvariance],
    roles: Mapping[str, ParameterRole],
    *,
    shrink: float,
    narrow: torch.dtype,
) -> dict[str, ScaleInvariance]:
    """Add the eps share of every scale-invariant unit at the user's own weights, where it can be read.

    Args:
        call: Computes the loss.
        verdicts: Of the trainable parameters; ``needs_bias`` with the same names as the keys.
        roles: Of the parameters that the verdicts are on.
        shrink: Factor that makes eps negligible.
        narrow: The user's type, whose eps is the default of RMSNorm.
    """
    invariant = {name: verdict for name, verdict in verdicts.items() if verdict.is_invariant}
    found = dict(verdicts)
    if not invariant:
        return found
    wanted = invariant.keys() | {v.needs_bias for v in invariant.values()}
    roles = {name: role for name, role in roles.items() if name in wanted}
    looked_at = {name: [_axis(invariant.get(name))] for name in roles}
    point = call.own_point()
    weights = {name: point[name] for name in roles}

    def read(then: Callable[[list[_Reading], Losses], T], shrink: float) -> T:
        with NormReader(torch.finfo(narrow).eps) as reader:
            # A copy, because what is done with the readings adds an eps as well, and is read in turn.
            return call.run(point, lambda losses: then(list(reader.readings), losses), seed=0, shrink=shrink)

    try:
        own = read(lambda readings, _: [_Reading(r.variance.detach(), r.eps) for r in readings], 1.0)
        shares = [r.eps / (r.variance + r.eps) for r in own]
        ones = [torch.ones_like(share) for share in shares]
        sums: list[dict[str, EulerSums]] = []
        for constants in [[shares], [ones]] if call.in_place else [[shares, ones]]:
            complete, some = read(partial(_degrees, constants=constants, weights=list(weights.values())), shrink)
            sums += [euler_sums(call, weights, gradients, looked_at) for gradients in some]
            del some  # as large as the model
    except ProbeError:
        return found
    met, places = sums
    standardized = _standardized(call, {n: weights[n] for n, v in invariant.items() if v.kind == "neuron"}, roles, own)
    for name, verdict in invariant.items():
        median, worst = _summary(_per_unit(verdict, name, met), _per_unit(verdict, name, places), complete)
        found[name] = replace(verdict, rho_median=median, rho_worst=worst, standardized=name in standardized)
    return found


def _standardized(
    call: Call, weights: Mapping[str, Tensor], roles: Mapping[str, ParameterRole], readings: Sequence[_Reading]
) -> set[str]:
    """Those of some weights by whose rows' own variance a normalization divides, or adds its eps to their deviation."""
    real = {name: weight for name, weight in weights.items() if not weight.is_complex()}
    axes = {name: Axis(roles[name].dim, roles[name].groups) for name in real}
    rows = {n: Table.along(w.detach().to(wide(w), copy=True), [axes[n]], call.shards.get(n)) for n, w in real.items()}
    close = 100 * torch.finfo(call.dtype).eps  # no data has the variance of the rows to that many digits
    found = set()
    for name, tables in call.summed(rows).items():
        sums, squares = tables[axes[name]]
        entries = call.shape(name, real[name]).numel() // len(sums)
        variances = [(squares - sums.square() / entries) / max(1, entries - correction) for correction in (0, 1)]
        measured = [r.variance.flatten().cpu().to(sums.dtype) for r in readings if r.variance.numel() == len(sums)]
        own = [v for variance in variances for v in (variance, variance.sqrt())]
        if any(torch.allclose(m, v, rtol=close, atol=0.0) for m in measured for v in own):
            found.add(name)
    return found


def _degrees(
    readings: list[_Reading], losses: Losses, constants: list[list[Tensor]], weights: list[Tensor]
) -> tuple[bool, list[Gradients]]:
    """Whether all variances are in the graph, and ``∂Φ_c/∂w`` for each choice of the constants c."""
    if any([r.variance.shape for r in readings] != [c.shape for c in chosen] for chosen in constants):
        raise ProbeError("The normalizations differ from one call to the next.")
    inside = [r.variance.requires_grad for r in readings]
    found: list[Gradients] = []
    for chosen in constants:
        pairs = [(r.variance, c) for r, c in zip(readings, chosen, strict=True) if r.variance.requires_grad]
        # v/(2·constant v) has the gradient of ½ log v, but no trouble where v is 0.
        phi = sum((c * torch.where(v > 0, v / (2 * v.detach()), 0.0)).sum() for v, c in pairs)
        nothing = (None,) * len(weights)
        found.append(losses.gradients_of(phi, weights) if isinstance(phi, Tensor) else nothing)
    return all(inside), found


def _per_unit(verdict: ScaleInvariance, name: str, degrees: Mapping[str, EulerSums]) -> Tensor:
    bias = degrees[verdict.needs_bias].tables if verdict.needs_bias is not None else None
    return unit_table(verdict, degrees[name].tables, bias).sums


def _axis(verdict: ScaleInvariance | None) -> Axis:
    """The axis that the units of a verdict run along; that of a vector for a bias, which has no other."""
    return Axis(0) if verdict is None or verdict.dim is None else Axis(verdict.dim, verdict.groups)


def _summary(met: Tensor, places: Tensor, complete: bool) -> tuple[float, float] | tuple[None, None]:
    """Median and largest share; None where they could not be read, such as within reentrant checkpointing."""
    # A unit feeds half a place where eps is added to a standard deviation; less than that is roundoff.
    seen = (places > 0.1) & met.isfinite()
    if not bool(seen.any()):
        return (0.0, 0.0) if complete else (None, None)
    share = (met[seen] / places[seen]).clamp(0, 1)
    return float(share.median()), float(share.max())
