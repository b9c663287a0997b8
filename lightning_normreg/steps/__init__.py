"""The objects behind the callbacks, for loops without a Trainer; the optimizer's own hooks do the timing.

Examples:
    >>> import torch
    >>> from lightning_normreg import find_scale_invariance
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
    >>> optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.5), torch.randn(8, 3)
    >>> verdict = find_scale_invariance(model, batch, forward=lambda m, x: m(x).exp().mean())
    >>> rotation = RotationTracker(watch(model, verdict))
    >>> projector = Projector(watch(model, verdict, include=["0.weight"]), radius=2.0)
    >>> projector.project(projector.targets)
    >>> dispatcher = StepDispatcher()
    >>> dispatcher.subscribe(rotation)
    >>> dispatcher.subscribe(projector)
    >>> dispatcher.attach([optimizer])
    >>> rotation.arm(True)  # measure the coming step; after arm(False) steps cost nothing
    >>> model(batch).exp().mean().backward()
    >>> optimizer.step()
    >>> values = tags(rotation.collect())
    >>> round(values["weights/effective_lr/0.weight"], 6)  # lr / ‖w‖²
    0.125
    >>> round(model[0].weight.norm().item(), 6)
    2.0
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_normreg import _metrics
from lightning_normreg._symmetries import Symmetries, units_and_sets, watch_sets
from lightning_normreg._weights import UnitArgument, Verdict, Watched, named_roles
from lightning_normreg._weights import watch as _watch
from lightning_normreg.steps._projector import Projector as Projector
from lightning_normreg.steps._rotation_tracker import RotationTracker as RotationTracker
from lightning_normreg.steps._rotator import Rotator as Rotator
from lightning_normreg.steps._step_hooks import StepDispatcher as StepDispatcher
from lightning_normreg.steps._subscriber import StepSubscriber as StepSubscriber
from lightning_normreg.steps._tracker import NormTracker as NormTracker
from lightning_normreg.steps._tracker import Row


def watch(
    module: nn.Module,
    verdict: Verdict | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    unit: UnitArgument = "auto",
    symmetries: Symmetries | None = None,
) -> list[Watched]:
    """Select parameters of a module, each with the units that it is seen in.

    Args:
        module: The module.
        verdict: Which units are scale-invariant, from :func:`find_scale_invariance`.
        include: Globs over clean parameter names; by default weights and embeddings. A glob that matches nothing is an
            error.
        exclude: Globs of parameters to leave out.
        unit: ``"auto"``: the units that are scale-invariant, the whole tensor where none is, and neurons without a
            verdict; ``"neuron"``, ``"column"`` or ``"layer"``; ``"set"``, for a projector: units and sets.
        symmetries: From :func:`find_symmetries`: its sets are added, and what else is in these; for ``"set"``
            these and the weights that the verdict says are scale-invariant by themselves, and nothing else.

    Returns:
        What the trackers and the projector take. Each has a ``name`` and says whether it is ``invariant``.

    Raises:
        ValueError: If a glob matches nothing, nothing is left, or ``unit="set"`` without ``symmetries`` or where
            nothing is scale-invariant.

    Examples:
        >>> [w.name for w in watch(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), exclude=["1.*"])]
        ['0.weight']
    """
    named = named_roles(module)
    watched = _watch(named, include, exclude, unit, verdict)
    if symmetries is None:
        if unit == "set":
            raise ValueError("`symmetries` must be given for unit='set': pass find_symmetries(module, batch).")
        return watched
    sets, beside = watch_sets(watched, named, symmetries, verdict, exclude)
    if unit != "set":
        return [*watched, *sets, *beside]
    found = [w for w in units_and_sets(watched, sets) if w.invariant]
    if not found:
        raise ValueError(
            "`symmetries` must have a set of what is selected for unit='set', or `verdict` a weight that is "
            "scale-invariant by itself, but there is neither. To hold norms all the same, use unit='layer'."
        )
    return found


def tags(row: Row, prefix: str = _metrics.PREFIX) -> dict[str, float]:
    """Measured values by the tags that the callbacks log them under.

    Args:
        row: From a tracker's ``collect()``.
        prefix: First part of the tags.

    Returns:
        ``{"weights/quantity/parameter": value}``, for any logger; empty where no step was measured.

    Examples:
        >>> tags({"0.weight": {_metrics.ROTATION: 0.1}})
        {'weights/rotation/0.weight': 0.1}
    """
    return {_metrics.tag(curve, name, prefix): value for name, values in row.items() for curve, value in values.items()}
