"""Plans from modules and optimizers, or from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from scipy import optimize
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg._optimizers import Group, NoRule, UpdateRule, find_rule, named_rules, unequal
from lightning_normreg._reports._plan import Plan, plan_of
from lightning_normreg._symmetries import Symmetries, watch_sets
from lightning_normreg._weights import ParameterRole, Part, Verdict, Watched, named_roles, norms_of, watch
from lightning_normreg.steps._formulas import Rates

Named = Sequence[tuple[str, Parameter, ParameterRole]]
Owner = tuple[UpdateRule | NoRule | None, Group, Sequence[Rates]]


def plan(
    units: nn.Module | Mapping[str, tuple[float, int | Sequence[int]]],
    recipe: Optimizer | Mapping[str, Any],
    schedule: Sequence[float],
    *,
    invariance: Verdict | None = None,
    symmetries: Symmetries | None = None,
) -> Plan:
    r"""Predict norms and rotations of scale-invariant weights over a run, from norms at the start and the recipe.

    The norm equation (:func:`functional.predicted_norm`) along the schedule, and the rotation of a step from the norm
    that it gives (:func:`functional.predicted_rotation`). Under Adam and AdamW that is all there is to know: in small
    networks medians over runs were within 15 % (``python -m tests.benchmarks.plan_table``). What can be further off is
    refused, and said: weights that are not scale-invariant, SGD and all whose norms depend on the size of gradients,
    Lion and Muon, whose norms depend on the signal in them, runs shorter than twice the memory of the second moment.
    Units of several rows, and sets of tensors, have numbers for two relaxation times: Adam divides each entry by its
    own size, so that in time the loss moves norm between them.

    Args:
        units: A module, of which ``invariance`` and ``symmetries`` say what is scale-invariant; or of each unit by
            name its norm, and the number of its entries where it is one row (a neuron), or the shape of a matrix.
        recipe: The module's optimizer as it is before the first step; or ``{"optimizer": "AdamW", "lr": 1e-3,
            "weight_decay": 0.1}``, a class of torch.optim or a dotted path, with any of its settings.
        schedule: Factor of the learning rate in each step, as of a LambdaLR: as many as the run has steps.
        invariance: From :func:`find_scale_invariance`.
        symmetries: From :func:`find_symmetries`, for sets of tensors that are scale-invariant together.

    Returns:
        The plan: numbers, sentences, and what is refused.

    Raises:
        ValueError: If the schedule is empty, the optimizer is unknown, or nothing says what is scale-invariant.

    Examples:
        >>> warm_up = [min(1, (step + 1) / 100) for step in range(2000)]
        >>> recipe = {"optimizer": "AdamW", "lr": 1e-3, "weight_decay": 0.1}
        >>> found = plan({"conv.weight": (3.0, 576)}, recipe, warm_up)
        >>> [round(norm, 2) for norm in found.units["conv.weight"].norm[:: len(found.at) - 1]]
        [3.0, 2.65]
        >>> round(found.units["conv.weight"].timescale, 2)  # 1/Σ(lr·decay), as a share of the run
        5.13

    Reference:
        Derived here, see :func:`functional.equilibrium_norm`.
    """
    if not len(schedule):
        raise ValueError("`schedule` must have a factor for each step, got none. Use [1.0] * steps for a constant one.")
    if isinstance(units, nn.Module):
        if invariance is None and symmetries is None:
            raise ValueError(
                "`invariance` must be given for a module: pass find_scale_invariance(module, batch), and for networks "
                "with skip connections symmetries=find_symmetries(module, batch)."
            )
        named = named_roles(units)
        watched = watch_all(named, invariance or {}, symmetries)
    else:
        watched = [_unit(name, size) for name, (_, size) in units.items()]
    if isinstance(units, nn.Module):
        norms = norms_of(watched)
    else:
        norms = [torch.tensor([norm], dtype=torch.float64) for norm, _ in units.values()]
    known = [*zip(watched, norms, strict=True)]
    if not isinstance(recipe, Optimizer):
        return plan_norms(known, recipe, schedule)
    rates = {id(group): _rates(find_rule(recipe, group), group, schedule) for group in recipe.param_groups}
    owners, refused = owners_of(watched, [recipe], rates)
    return plan_of(known, owners, len(schedule), refused=refused_for_symmetry(watched) | refused)


def plan_norms(known: Sequence[tuple[Watched, Tensor]], recipe: Mapping[str, Any], schedule: Sequence[float]) -> Plan:
    """The plan of weights, each with the norms of its units, under one recipe for all."""
    owner = _owner(recipe, schedule)
    refused = refused_for_symmetry([one for one, _ in known])
    return plan_of(known, {one.name: owner for one, _ in known}, len(schedule), refused=refused)


def watch_all(named: Named, verdict: Verdict, symmetries: Symmetries | None) -> list[Watched]:
    """Matrices and embeddings, and sets of them."""
    watched = watch(named, None, (), "auto", verdict or None)
    sets = [] if symmetries is None else watch_sets(watched, named, symmetries, verdict)[0]
    return [*watched, *sets]


def refused_for_symmetry(watched: Sequence[Watched]) -> dict[str, str]:
    """By name why no norm can be planned, of what is not scale-invariant, or only together with others."""
    together = {p: one.name for one in watched if one.members and one.invariant for p in one.tensors()}
    found = {}
    for one in watched:
        if one.invariant is None:
            found[one.name] = "Whether it is scale-invariant is not known."
        elif one.invariant:
            continue
        elif one.parameter in together and not one.members:
            found[one.name] = f"It is scale-invariant only as a part of {together[one.parameter]}."
        elif one.members:
            found[one.name] = "Its tensors are scale-invariant together where eps is negligible, and here it is not."
        else:
            found[one.name] = "It is not scale-invariant by itself, so its norm depends on what it learns."
    return found


def owners_of(
    watched: Sequence[Watched], optimizers: Sequence[Optimizer], rates: Mapping[int, Sequence[Rates]]
) -> tuple[dict[str, Owner], dict[str, str]]:
    """Of each weight rule, group and rates of its optimizer; and of which there are none that could be planned by.

    ``rates`` has learning rate and decay of all steps by the ``id`` of a parameter group.
    """
    owners: dict[str, Owner] = {}
    refused: dict[str, str] = {}
    groups = {
        p: (optimizer, group) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    for one in watched:
        if not any(p in groups and p.requires_grad for p in one.tensors()):
            refused[one.name] = "No optimizer updates it."
            continue
        optimizer, group = groups.get(one.parameter, (None, None))
        if optimizer is None or group is None or (apart := unequal(optimizer, one.tensors(), "lr", "weight_decay")):
            apart = ["optimizer"] if optimizer is None else apart
            refused[one.name] = f"Its tensors have unequal {' and '.join(apart)}, and it needs the same."
            continue
        owners[one.name] = (find_rule(optimizer, group), group, rates[id(group)])
    return owners, refused


def _rates(rule: UpdateRule | NoRule | None, group: Group, schedule: Sequence[float]) -> list[Rates]:
    lr = float(rule.lr(group) if isinstance(rule, UpdateRule) else group["lr"])
    return [(lr * factor, float(group.get("weight_decay", 0.0))) for factor in schedule]


def _owner(recipe: Mapping[str, Any], schedule: Sequence[float]) -> Owner:
    if missing := {"optimizer", "lr"} - recipe.keys():
        raise ValueError(f"`recipe` must have {' and '.join(sorted(missing))}, got {sorted(recipe)}.")
    group = {key: value for key, value in recipe.items() if key != "optimizer"}
    rules = named_rules(str(recipe["optimizer"]), group)
    if not rules:
        raise ValueError(
            f"`recipe` must name an optimizer that is known, got {recipe['optimizer']!r}. Use a class of torch.optim, "
            "or package.Class."
        )
    rule = rules[-1]  # that with nothing switched on which is not named
    return rule, group, _rates(rule, group, schedule)


def _unit(name: str, size: int | Sequence[int]) -> Watched:
    shape = (1, size) if isinstance(size, int) else tuple(size)
    part = Part("neuron" if isinstance(size, int) else "layer")
    return Watched(name, Parameter(torch.empty(shape, device="meta")), _WEIGHT, (part,), invariant=True)


_WEIGHT = ParameterRole("weight", "", "")


def factor_for(goal: tuple[str, float], build: Callable[[float], Plan], plan: Plan) -> float:
    """By what decay, or the learning rate, is to be multiplied for a goal: what ``build`` takes.

    Raises:
        ValueError: If no factor between 1e-4 and 1e4 does it.
    """
    key, value = goal

    def off(log_factor: float) -> float:
        return math.log(_reached(key, build(math.exp(log_factor))) / value)

    _reached(key, plan)
    ends = [(x, off(x)) for x in _tried(off)]
    sides = [x for (x, y), (_, z) in pairwise(ends) if y * z <= 0]
    if not sides:
        low, high = (math.exp(y) * value for y in (min(y for _, y in ends), max(y for _, y in ends)))
        raise ValueError(f"within what can be planned it is {low:.3g} to {high:.3g}.")
    low = sides[0]
    high = next(x for x, _ in ends if x > low)
    return math.exp(optimize.brentq(off, low, high, xtol=1e-6))


def _tried(off: Callable[[float], float]) -> list[float]:
    """Logarithms of factors, from 1e-4 to 1e4, at which there is a plan."""
    found = []
    for power in range(-4, 5):
        with suppress(ValueError):
            off(x := power * math.log(10))
            found.append(x)
    return found


def _reached(key: str, plan: Plan) -> float:
    """Of all that is planned the median."""
    if not plan.units:
        raise ValueError("nothing can be planned.")
    if key == "timescale":
        found = [unit.timescale for unit in plan.units.values() if math.isfinite(unit.timescale)]
        if not found:
            raise ValueError("nothing is decayed. Give a weight_decay to start from.")
        return median(found)
    return median(plan.typical_rotation(name) for name in plan.units)
