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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_normreg._symmetries._call import PrivateCall
from lightning_normreg._symmetries._dispatch import is_eps
from lightning_normreg._symmetries._euler import EulerSums, euler_sums
from lightning_normreg._symmetries._losses import ProbeError
from lightning_normreg._symmetries._slices import Axis, unit_table
from lightning_normreg._weights import ParameterRole, ScaleInvariance
from lightning_normreg.functional._units import split_units, unit_rows

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
    call: PrivateCall,
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

    def read(then: Callable[[list[_Reading]], T], shrink: float) -> T:
        with NormReader(torch.finfo(narrow).eps) as reader:
            # A copy, because what is done with the readings adds an eps as well, and is read in turn.
            return call.run(point, lambda _losses: then(list(reader.readings)), seed=0, shrink=shrink)

    try:
        own = read(lambda readings: [_Reading(r.variance.detach(), r.eps) for r in readings], 1.0)
        shares = [r.eps / (r.variance + r.eps) for r in own]
        complete, met, places = read(lambda readings: _degrees(readings, shares, point, looked_at), shrink)
    except ProbeError:
        return found
    for name, verdict in invariant.items():
        median, worst = _summary(_per_unit(verdict, name, met), _per_unit(verdict, name, places), complete)
        standardized = verdict.kind == "neuron" and _is_standardized(point[name], roles[name], own)
        found[name] = replace(verdict, rho_median=median, rho_worst=worst, standardized=standardized)
    return found


def _is_standardized(weight: Tensor, role: ParameterRole, readings: Sequence[_Reading]) -> bool:
    """Whether a normalization divides by the variance of the weight's own rows, or adds its eps to their deviation."""
    neurons = weight.shape[role.dim] * role.groups if weight.ndim > 1 else 1
    readings = [r for r in readings if r.variance.numel() == neurons]
    if weight.is_complex() or not readings:
        return False
    rows = unit_rows(*split_units(weight, "neuron", role.dim, role.groups))
    variances = [rows.var(1, correction=correction) for correction in (0, 1)]
    close = 100 * torch.finfo(rows.dtype).eps  # no data has the variance of the rows to that many digits
    return any(
        torch.allclose(r.variance.flatten(), own, rtol=close, atol=0.0)
        for r in readings
        for own in (*variances, *(v.sqrt() for v in variances))
    )


def _degrees(
    readings: list[_Reading], shares: list[Tensor], point: dict[str, Tensor], axes: Mapping[str, Sequence[Axis]]
) -> tuple[bool, dict[str, EulerSums], dict[str, EulerSums]]:
    """Whether all variances are in the graph, and ``w·∂Φ_c/∂w`` of each parameter, with c = ρ and with c = 1."""
    if [r.variance.shape for r in readings] != [share.shape for share in shares]:
        raise ProbeError("The normalizations differ from one call to the next.")
    pairs = [(r.variance, share) for r, share in zip(readings, shares, strict=True) if r.variance.requires_grad]
    weights = [point[name] for name in axes]

    def degrees(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, EulerSums]:
        # v/(2·constant v) has the gradient of ½ log v, but no trouble where v is 0.
        phi = sum((c * torch.where(v > 0, v / (2 * v.detach()), 0.0)).sum() for v, c in pairs)
        gradients: Sequence[Tensor | None] = [None] * len(weights)
        if isinstance(phi, Tensor):
            gradients = torch.autograd.grad(phi, weights, retain_graph=True, allow_unused=True)
        return {n: euler_sums(w, g, axes[n]) for n, w, g in zip(axes, weights, gradients, strict=True)}

    ones = [(variance, torch.ones_like(share)) for variance, share in pairs]
    return len(pairs) == len(shares), degrees(pairs), degrees(ones)


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
