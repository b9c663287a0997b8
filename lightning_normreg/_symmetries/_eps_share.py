r"""The eps share ρ = eps/(var + eps) that the normalizations behind each unit have at the user's own weights.

Which normalizations are behind a unit follows from the same relation that finds the units: without eps, everything is
homogeneous of degree 0 in a scale-invariant unit w, except for the variances v that it feeds before they are normalized
away. With one constant c per entry of all variances,

.. math:: \Phi_c = \sum_j c_j \tfrac12 \log v_j \quad\Rightarrow\quad \langle w, \partial\Phi_c/\partial w\rangle =
    \sum_{j \text{ behind } w} c_j .

Two backward passes, with c = ρ and with c = 1, give the mean ρ that each unit meets.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_normreg._symmetries._call import PrivateCall, ProbeError
from lightning_normreg._symmetries._dispatch import is_eps
from lightning_normreg._symmetries._euler import euler_sums
from lightning_normreg._symmetries._slices import Axis, unit_of_slice, unit_sums
from lightning_normreg._weights import ParameterRole, ScaleInvariance
from lightning_normreg.functional._units import split_units, unit_rows


@dataclass(frozen=True)
class EpsShare:
    """What the normalizations behind one weight have of eps.

    Attributes:
        median: Median over the units; None where it could not be read, such as within reentrant checkpointing.
        worst: The largest.
        standardized: Whether one of them normalizes the rows of the weight themselves.
    """

    median: float | None = None
    worst: float | None = None
    standardized: bool = False


Shares = dict[str, EpsShare]


@dataclass(frozen=True)
class _Reading:
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
        if func in _VARIANCES:
            self._read_norm(func, args, kwargs)
        elif func in _ADDS and len(args) > 1 and isinstance(args[0], Tensor) and is_eps(args[1]):
            variance = args[0].clone() if func in _IN_PLACE else args[0]
            self.readings.append(_Reading(variance, args[1]))
        return func(*args, **kwargs)

    def _read_norm(self, func: Any, args: Any, kwargs: Any) -> None:
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        # Checkpointing counts the tensors that are saved, and these are not there when it recomputes.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            variance = _VARIANCES[func](bound.arguments)
        if variance is not None:
            eps = bound.arguments["eps"]
            self.readings.append(_Reading(variance, self._narrow_eps if eps is None else eps))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _batch_variance(a: Mapping[str, Any]) -> Tensor | None:
    x: Tensor = a["input"]
    return _variance(x, [d for d in range(x.ndim) if d != 1]) if a["training"] else None


def _instance_variance(a: Mapping[str, Any]) -> Tensor | None:
    return _variance(a["input"], list(range(2, a["input"].ndim))) if a["use_input_stats"] else None


def _group_variance(a: Mapping[str, Any]) -> Tensor:
    return _variance(a["input"].reshape(len(a["input"]), a["num_groups"], -1), [2])


def _layer_variance(a: Mapping[str, Any]) -> Tensor:
    return _variance(a["input"], list(range(-len(a["normalized_shape"]), 0)))


def _mean_square(a: Mapping[str, Any]) -> Tensor:
    x: Tensor = a["input"]
    return x.square().mean(list(range(-len(a["normalized_shape"]), 0)))


def _variance(x: Tensor, dims: list[int]) -> Tensor:
    return x.var(dims, correction=0)


_VARIANCES: dict[Any, Any] = {
    F.batch_norm: _batch_variance,
    F.instance_norm: _instance_variance,
    F.group_norm: _group_variance,
    F.layer_norm: _layer_variance,
    F.rms_norm: _mean_square,
}
_SIGNATURES = {func: inspect.signature(func) for func in _VARIANCES}
_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *_IN_PLACE}


def eps_shares(
    call: PrivateCall,
    verdicts: Mapping[str, ScaleInvariance],
    roles: Mapping[str, ParameterRole],
    *,
    shrink: float,
    narrow: torch.dtype,
) -> Shares:
    """Measure the eps share of every scale-invariant unit at the user's own weights.

    Args:
        call: Computes the loss.
        verdicts: Of the trainable parameters; ``needs_bias`` with the same names as the keys.
        roles: The same.
        shrink: Factor that makes eps negligible.
        narrow: The user's type, whose eps is the default of RMSNorm.

    Returns:
        Name → what was found. Left out are weights for which nothing could be read.
    """
    invariant = {name: verdict for name, verdict in verdicts.items() if verdict.is_invariant}
    if not invariant:
        return {}
    wanted = invariant.keys() | {v.needs_bias for v in invariant.values()}
    roles = {name: role for name, role in roles.items() if name in wanted}
    point = {name: t.requires_grad_(name in roles) for name, t in call.own_point().items()}
    try:
        kept = _read(
            call, point, lambda readings: [_Reading(r.variance.detach(), r.eps) for r in readings], 1.0, narrow
        )
        found = _attribute(call, point, invariant, roles, [_share(r) for r in kept], shrink=shrink, narrow=narrow)
    except ProbeError:
        return {}
    for name, verdict in invariant.items():
        if verdict.kind == "neuron" and _is_standardized(point[name], roles[name], kept):
            found[name] = replace(found.get(name, EpsShare()), standardized=True)
    return found


def _share(reading: _Reading) -> Tensor:
    return reading.eps / (reading.variance + reading.eps)


def _is_standardized(weight: Tensor, role: ParameterRole, readings: Sequence[_Reading]) -> bool:
    """Whether a normalization divides by the variance of the weight's own rows, or adds its eps to their deviation."""
    if weight.is_complex():
        return False
    rows = unit_rows(*split_units(weight, "neuron", role.dim, role.groups))
    variances = [rows.var(1, correction=correction) for correction in (0, 1)]
    close = 100 * torch.finfo(rows.dtype).eps  # no data has the variance of the rows to that many digits
    return any(
        torch.allclose(r.variance.flatten(), own, rtol=close, atol=0.0)
        for r in readings
        for own in (*variances, *(v.sqrt() for v in variances))
        if r.variance.numel() == own.numel()
    )


def _read(call: PrivateCall, point: Mapping[str, Tensor], then: Any, shrink: float, narrow: torch.dtype) -> Any:
    with NormReader(torch.finfo(narrow).eps) as reader:
        # A copy, because what is done with the readings adds an eps as well, and is read in turn.
        return call.run(point, lambda loss: then(list(reader.readings)), seed=0, shrink=shrink)


def _attribute(
    call: PrivateCall,
    point: dict[str, Tensor],
    verdicts: Mapping[str, ScaleInvariance],
    roles: Mapping[str, ParameterRole],
    kept: list[Tensor],
    *,
    shrink: float,
    narrow: torch.dtype,
) -> Shares:
    def backward(readings: list[_Reading]) -> tuple[bool, dict[str, Tensor], dict[str, Tensor]]:
        if [r.variance.shape for r in readings] != [share.shape for share in kept]:
            raise ProbeError("The normalizations differ from one call to the next.")
        pairs = [(r.variance, share) for r, share in zip(readings, kept, strict=True) if r.variance.requires_grad]
        ones = [(variance, torch.ones_like(share)) for variance, share in pairs]
        return len(pairs) == len(kept), _degrees(pairs, point, roles), _degrees(ones, point, roles)

    complete, shares, counts = _read(call, point, backward, shrink, narrow)
    found: Shares = {}
    for name, verdict in verdicts.items():
        met, places = (_per_unit(verdict, name, degrees) for degrees in (shares, counts))
        share = _summary(met, places, complete)
        if share is not None:
            found[name] = EpsShare(*share)
    return found


def _degrees(pairs: list[tuple[Tensor, Tensor]], point: dict[str, Tensor], roles: Mapping[str, ParameterRole]) -> Any:
    """``w·∂Φ_c/∂w`` summed per slice, for each parameter."""
    # v/(2·constant v) has the gradient of ½ log v, but no trouble where v is 0.
    phi = sum((c * torch.where(v > 0, v / (2 * v.detach()), 0.0)).sum() for v, c in pairs)
    weights = [point[name] for name in roles]
    if not isinstance(phi, Tensor):
        return {name: euler_sums(w, None, roles[name]) for name, w in zip(roles, weights, strict=True)}
    gradients = torch.autograd.grad(phi, weights, retain_graph=True, allow_unused=True)
    return {n: euler_sums(w, g, roles[n]) for n, w, g in zip(roles, weights, gradients, strict=True)}


def _per_unit(verdict: ScaleInvariance, name: str, degrees: Mapping[str, Any]) -> Tensor:
    found = degrees[name].sums
    axis = next(iter(found)) if verdict.dim is None else Axis(verdict.dim, verdict.groups)
    sums = found[axis]
    if verdict.needs_bias is not None:
        sums = sums + degrees[verdict.needs_bias].sums[Axis(0)]
    return unit_sums(sums, unit_of_slice(verdict, len(sums)))


def _summary(met: Tensor, places: Tensor, complete: bool) -> tuple[float, float] | None:
    # A unit feeds half a place where eps is added to a standard deviation; less than that is roundoff.
    seen = (places > 0.1) & met.isfinite()
    if not bool(seen.any()):
        return (0.0, 0.0) if complete else None
    share = (met[seen] / places[seen]).clamp(0, 1)
    return float(share.median()), float(share.max())
