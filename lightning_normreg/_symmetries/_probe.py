"""Which units of a module's parameters are scale-invariant: the steps, one after the other."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from tqdm import tqdm

from lightning_normreg._symmetries._call import Loss, PrivateCall, check_callable
from lightning_normreg._symmetries._certificate import certify, moving
from lightning_normreg._symmetries._classify import classify, dead_parameters, open_axes, unreached
from lightning_normreg._symmetries._eps_share import with_eps_shares
from lightning_normreg._symmetries._euler import EulerSums
from lightning_normreg._symmetries._in_place import InPlaceCall, is_distributed
from lightning_normreg._symmetries._losses import ProbeError
from lightning_normreg._symmetries._reasons import (
    FROZEN,
    INERT,
    KEEPS_STATE,
    UNREACHED,
    UNSTEADY,
    VANISHED,
    demoted,
    explain,
)
from lightning_normreg._symmetries._setup import ATTEMPTS, Setup
from lightning_normreg._symmetries._vocabulary import reached_rows, shrink_tables
from lightning_normreg._weights import Evidence, ScaleInvariance, is_sharded

ProbeType = Literal["auto", "float64", "float32"]
TYPES: dict[str, torch.dtype] = {"float64": torch.float64, "float32": torch.float32}
MOMENT = 1.5
"""Seconds after which progress is shown."""


def find_scale_invariance(
    module: nn.Module,
    batch: Any = None,
    *,
    forward: Loss | None = None,
    dtype: ProbeType = "auto",
    seed: int = 0,
    draws: int = 4,
    in_place: bool = False,
    progress: bool = True,
) -> dict[str, ScaleInvariance]:
    r"""Find out which units of which parameters can be rescaled without changing the loss.

    A unit w is scale-invariant when :math:`L(a w) = L(w)` for every a > 0, in training mode. Then Euler's relation
    :math:`\langle w, \partial L/\partial w\rangle = 0` holds at every point. Here it is tested at a few generic points,
    where nothing vanishes by accident, with every eps of a normalization made negligible; then all units that passed
    are rescaled at once, which must leave the loss alone. The work is done on a private copy: the module, its buffers,
    metrics, Trainer, optimizers, schedulers and loggers, and the random states of torch, NumPy and Python stay as they
    are; no other thread sees another default type. Each call has a fresh copy. Out of reach are objects that a closure
    holds, and ``torch.get_default_dtype()``, which stays the user's. Under manual optimization each backward pass is a
    loss of its own, and a weight is scale-invariant if it is so under all whose gradient reaches it before its
    optimizer steps.

    A sharded module (FSDP, tensor parallel) is asked in place, by all processes together: the points are written into
    its shards, and weights, buffers, attributes, gradients and random states are put back bit for bit, also when the
    loss raises on all processes.

    Args:
        module: In training mode. A LightningModule (anything with a ``training_step``) is asked for its own loss.
        batch: A few real samples, as ``training_step`` gets them.
        forward: ``forward(module, batch) -> loss`` for other modules, or another loss than that of ``training_step``.
        dtype: ``"float64"``, ``"float32"``, or ``"auto"``: float64, and float32 with a warning where that fails.
        seed: Of everything that is drawn, ``≥ 0``.
        draws: Generic points, at least 2. Each costs a forward and a backward pass.
        in_place: Ask the module itself instead of a copy, in the type of its weights, also where it is not sharded: for
            models that are too large to be copied. Under manual optimization, and with weights narrower than float32,
            that is not possible.
        progress: Show a bar where it takes longer than a moment.

    Returns:
        Clean name → verdict, in the order of ``parameter_roles(module)``. Frozen parameters are unknown.

    Raises:
        ValueError: If an argument is out of its range, ``module`` is not in training mode, or there is no way to get at
            its loss: no ``training_step``, no batch.
        ProbeError: If the module cannot be copied, or asked in place, or if its loss cannot be computed there, is no
            scalar, or is not finite.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> verdicts = find_scale_invariance(model, torch.randn(8, 3), forward=lambda m, x: m(x).exp().mean())
        >>> for name, verdict in verdicts.items():
        ...     print(name, verdict.kind)
        0.weight neuron
        1.weight none
        1.bias none
        2.weight none
        2.bias none

    Reference:
        Twan van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, arXiv:1706.05350, section 2.
    """
    check_type(dtype, seed)
    if not isinstance(draws, int) or draws < 2:
        raise ValueError(f"`draws` must be an integer of at least 2, got {draws!r}: one draw can be luck.")
    if in_place or any(map(is_sharded, module.parameters())):
        return find_in_place(module, batch, forward, outer=module, seed=seed, draws=draws, progress=progress)
    check_callable(module, batch, forward)
    if dtype != "auto":
        return _probe(module, batch, forward, TYPES[dtype], seed=seed, draws=draws, progress=progress)
    try:
        return _probe(module, batch, forward, torch.float64, seed=seed, draws=draws, progress=progress)
    except (ProbeError, RuntimeError, TypeError, MemoryError) as error:
        verdicts = _probe(module, batch, forward, torch.float32, seed=seed, draws=draws, progress=progress)
        why = str(error.__cause__ or error)[:200]
        if is_first_rank():
            warnings.warn(f"Scale invariance was probed in float32, because float64 failed ({why}).", stacklevel=2)
        return {name: replace(v, reason=f"{v.reason} Probed in float32: {why}") for name, v in verdicts.items()}


def is_first_rank() -> bool:
    if is_distributed():
        return dist.get_rank() == 0
    return bool(getattr(rank_zero_only, "rank", 0) == 0)  # not set where Lightning was never imported


def check_type(dtype: str, seed: int) -> None:
    """Of a probe, and the seed of all that it draws."""
    if dtype not in ("auto", *TYPES):
        raise ValueError(f"`dtype` must be 'auto', 'float64' or 'float32', got {dtype!r}.")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be an integer of at least 0, got {seed!r}.")


def _probe(
    module: nn.Module, batch: Any, forward: Loss | None, dtype: torch.dtype, *, seed: int, draws: int, progress: bool
) -> dict[str, ScaleInvariance]:
    """All steps, in one type, with huge embeddings made small where that works."""
    reached = reached_rows(module, forward, batch)
    if reached:
        call = PrivateCall(module, forward, batch, dtype)
        shrink_tables(call.module, reached)
        setup = Setup(module, call, seed=seed, draws=draws)
        with contextlib.suppress(ProbeError):
            verdicts = _ask(setup, progress)
            small = [verdicts[setup.names[f"{name}.weight"][0]] for name in reached]
            if not any(v.dim == 0 and (v.kind == "block" or v.slices) for v in small):  # which would be other rows
                return verdicts
    return _ask(Setup(module, PrivateCall(module, forward, batch, dtype), seed=seed, draws=draws), progress)


def find_in_place(
    module: nn.Module,
    batch: Any,
    forward: Loss | None,
    *,
    outer: nn.Module,
    seed: int = 0,
    draws: int = 4,
    progress: bool = True,
) -> dict[str, ScaleInvariance]:
    """See :func:`find_scale_invariance`, asked of the real module, which ``outer`` wraps; every process must ask."""
    check_callable(module, batch, forward)
    with InPlaceCall(module, forward, batch, outer) as call:
        return _ask(Setup(module, call, seed=seed, draws=draws), progress)


def _ask(setup: Setup, progress: bool) -> dict[str, ScaleInvariance]:
    """The steps; with ``progress`` a bar shows them where that takes longer than a moment."""
    hidden = not (progress and is_first_rank())
    with tqdm(desc="Scale invariance", total=setup.draws + 2, delay=MOMENT, leave=False, disable=hidden) as bar:
        drawn = []
        for index in range(setup.draws):
            drawn.append(setup.draw(index))
            setup.axes = {name: open_axes(sums, setup.limits.z) for name, sums in drawn[-1].sums.items()}
            bar.update()
        reaching = {name: set().union(*(draw.reaching[name] for draw in drawn)) for name in setup.roles}
        masked = _masked(setup, [draw.masked for draw in drawn])
        verdicts = _confirmed(setup, _euler_verdicts(setup, [draw.sums for draw in drawn]), reaching)
        bar.update()
        verdicts = with_eps_shares(setup.call, verdicts, setup.roles, shrink=setup.limits.shrink, narrow=setup.narrow)
        bar.update()
    evidence: Evidence = "float64" if setup.call.dtype == torch.float64 else "float32"
    result = {}
    for raw, (clean, _) in setup.names.items():
        verdict = verdicts.get(raw, FROZEN)
        bias = setup.names[verdict.needs_bias][0] if verdict.needs_bias else None
        of = None if verdict.dim is None else setup.shapes[raw][verdict.dim] * verdict.groups
        verdict = replace(verdict, evidence=evidence, needs_bias=bias, of=of, masked=masked.get(raw, 0.0))
        result[clean] = explain(verdict) if verdict.has_units else verdict
    return result


def _masked(setup: Setup, drawn: list[dict[str, Tensor]]) -> dict[str, float]:
    """Share of the entries of each parameter that the same mask hides at every point; 0 where they are 0 anyway."""
    fixed = {n: mask for n, mask in drawn[0].items() if all(n in m and mask.equal(m[n]) for m in drawn)}
    own = setup.call.own_point() if fixed else {}
    return {name: float(mask.double().mean()) for name, mask in fixed.items() if bool(own[name].detach()[mask].any())}


def _euler_verdicts(setup: Setup, drawn: list[dict[str, EulerSums]]) -> dict[str, ScaleInvariance]:
    found = {name: EulerSums.stack([sums[name] for sums in drawn]) for name in setup.roles}
    away = unreached(found)
    if found and len(away) == len(found):
        raise ProbeError(
            "The loss must depend on the parameters of a private copy of the module, but none of them reaches it: a "
            "function that is kept in an attribute or a closure may be bound to the module itself. Pass `forward`, a "
            "function of (module, batch) that returns the loss."
        )
    small = dead_parameters(found, found.keys() - away, setup.limits.inert)
    # Beside the weight of its own module, which may have less of the gradient than others; what has vanished on the
    # way there has about as much as that weight.
    inert = {name for name in small if dead_parameters(_beside(name, found), [name], 100 * setup.limits.inert)}
    vanished = _vanished(setup, [name for name in found if name in small - inert])
    verdicts = {}
    for name, sums in found.items():
        biases = {bias: found[bias] for bias in setup.biases[name] if bias not in away | inert | vanished}
        known = {INERT: inert, UNREACHED: away, VANISHED: vanished}
        verdict = next((v for v, names in known.items() if name in names), None)
        verdicts[name] = verdict or classify(sums, biases, setup.limits)
    return verdicts


def _beside(name: str, found: Mapping[str, EulerSums]) -> dict[str, EulerSums]:
    """A parameter and the others of its module.

    Beside a live weight a bias without a gradient is inert. Where the whole module has next to none, it may have
    vanished on the way there.
    """
    owner = name.rpartition(".")[0]
    return {n: sums for n, sums in found.items() if n.rpartition(".")[0] == owner}


def _vanished(setup: Setup, names: list[str]) -> set[str]:
    """Those of some parameters with next to no gradient that do not change the loss by more than roundoff either."""
    if not names:
        return set()
    (point, _), (other, _) = setup.point(0), setup.point(1)
    return set(names) - moving(setup.call, point, other, names, shrink=setup.limits.shrink)


def _confirmed(
    setup: Setup, verdicts: dict[str, ScaleInvariance], reaching: Mapping[str, set[int]]
) -> dict[str, ScaleInvariance]:
    """The verdicts without those that the certificate refutes."""
    invariant = {name: v for name, v in verdicts.items() if v.is_invariant}
    for attempt in range(ATTEMPTS):
        point, seed = setup.certificate_point(invariant.keys(), attempt)
        found = certify(setup.call, point, invariant, setup.limits, seed=seed, reaching=reaching)
        if found is None:
            continue
        if not found.steady:
            if setup.call.in_place:
                return verdicts | dict.fromkeys(invariant, KEEPS_STATE)
            return verdicts | {name: replace(v, reason=UNSTEADY) for name, v in invariant.items()}
        return {name: demoted(v, found.changes[name]) if name in found.changes else v for name, v in verdicts.items()}
    raise ProbeError(f"The loss must be finite close to the module's weights, but was not at {ATTEMPTS} points there.")
