"""Multiplying weights while they train, so that their directions go on as if nothing had happened.

They get parameter groups of their own, also in a run that is resumed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._optimizers import Group, NoRule, UpdateRule, find_rule, group_of
from lightning_normreg._param_groups import _scheduler_rates
from lightning_normreg._param_groups._scheduler_rates import Scheduler

# Key in a group that was split off: index of the group that it was in, and its positions there at that time (in older
# states one position, as a number).
_ORIGIN = "split_from"


@overload
def rescale_(
    optimizer: Optimizer, parameter: Tensor, factor: float, *, schedulers: Sequence[Scheduler] = ()
) -> dict[str, Any]: ...


@overload
def rescale_(
    optimizer: Optimizer, parameter: Iterable[Tensor], factor: float, *, schedulers: Sequence[Scheduler] = ()
) -> list[dict[str, Any]]: ...


@torch.no_grad()
def rescale_(
    optimizer: Optimizer,
    parameter: Tensor | Iterable[Tensor],
    factor: float,
    *,
    schedulers: Sequence[Scheduler] = (),
) -> Any:
    """Multiply scale-invariant weights by c while they train, without a change to where their directions go.

    One weight, or all tensors of a set: those that are scale-invariant only together, with exponents 1
    (:func:`find_symmetries` finds them), such as all that write to the stream of a transformer. All of them are
    multiplied by the same c, so that the loss stays.

    Gradients of these weights are multiplied by 1/c from then on. Gradient and optimizer's state of each are multiplied
    by the power of c by which they go, the learning rate by c^p, weight decay by c^−2 (coupled) or c^−p (decoupled),
    and eps and other absolute constants by theirs. As these belong to a parameter group, weights that are in one group
    get a new one together, split off from it, unless they are all of it.

    Directions then agree to rounding; Muon and SOAP round to lower precision inside. One eps that stands in two places,
    as in AdamP and LAMB, follows where it counts more. What is outside of the optimizer does not follow: clipping by
    the norm of all gradients, and copies of the weights, as averages keep them.

    Args:
        optimizer: Their optimizer, of torch or of a package whose rule is known. A set of which several optimizers have
            a part takes one call for each, before the next step.
        parameter: The weight, or the weights of a set, as whole tensors. All of it must be scale-invariant, as one or
            in units that are all multiplied alike.
        factor: c, positive.
        schedulers: All learning-rate schedulers of the optimizer. They follow.

    Returns:
        The weight's parameter group; of several weights a list, with one for each group that they were in, in the
        order of those.

    Raises:
        TypeError: If ``optimizer`` is no ``torch.optim.Optimizer``, ``parameter`` holds something that is no tensor, or
            a scheduler is none of torch's own.
        ValueError: If ``factor`` is not a positive number, ``parameter`` is empty, holds a weight twice or one that is
            not the optimizer's, how its optimizer scales is not known, or its state or a scheduler cannot follow.
            Nothing has changed then.

    Examples:
        >>> weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        >>> optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5, eps=1e-8)
        >>> group = rescale_(optimizer, weights[0], 4.0)
        >>> weights[0].detach(), group["lr"], group["weight_decay"], group["eps"]
        (tensor([4., 4.]), 0.4, 0.125, 2.5e-09)
        >>> [(len(group["params"]), group["lr"]) for group in rescale_(optimizer, weights, 0.5)]
        [(2, 0.05), (1, 0.2)]

    Reference:
        Li, Lyu and Arora 2020, https://arxiv.org/abs/2010.02916, for SGD: (w, η, λ) → (c w, c² η, λ / c²).
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}. Of a wrapper, pass what it "
            "wraps."
        )
    if not (isinstance(factor, (int, float)) and math.isfinite(factor) and factor > 0):
        raise ValueError(f"`factor` must be a positive number, got {factor!r}.")
    places, groups = _places(optimizer, parameter), optimizer.param_groups
    others = sum(map(len, places.values())) < sum(len(group["params"]) for group in groups)
    rules = {index: _rule(optimizer, groups[index], positions, others) for index, positions in places.items()}
    _scheduler_rates.check_schedulers(optimizer, schedulers, rates=any(_rate(rule) for rule in rules.values()))

    changed = []
    for index, positions in places.items():
        whole = len(positions) == len(groups[index]["params"])
        changed.append(index if whole else _split(optimizer, index, positions, schedulers))
        _multiply(optimizer, changed[-1], rules[index], float(factor), schedulers)
    return groups[changed[0]] if isinstance(parameter, Tensor) else [groups[index] for index in changed]


def accept_rescaled(optimizer: Optimizer, schedulers: Sequence[Scheduler] = ()) -> None:
    """Let a fresh optimizer load the state of a run in which weights were rescaled.

    :func:`rescale_` gives weights parameter groups of their own. A fresh optimizer does not have these groups, and
    refuses a state that has; after this call it splits its groups in the same way before it loads such a state. Call it
    where the optimizer is made, in ``configure_optimizers``. Without rescaled weights it changes nothing.

    Args:
        optimizer: The fresh optimizer.
        schedulers: Its learning-rate schedulers, which are to load their state after it.

    Raises:
        TypeError: If a scheduler is none of torch's own.
        ValueError: If a scheduler is of another optimizer.

    Examples:
        >>> import torch
        >>> def make():
        ...     weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        ...     return weights, torch.optim.SGD(weights, lr=0.1)
        >>> from lightning_normreg import rescale_
        >>> weights, optimizer = make()
        >>> _ = rescale_(optimizer, weights[1], 2.0)
        >>> weights, fresh = make()
        >>> accept_rescaled(fresh)
        >>> fresh.load_state_dict(optimizer.state_dict())
        >>> [(group["lr"], len(group["params"])) for group in fresh.param_groups]
        [(0.1, 2), (0.4, 1)]
    """
    _scheduler_rates.check_schedulers(optimizer, schedulers, rates=False)

    def split_like(optimizer: Optimizer, state: dict[str, Any]) -> None:
        for saved in state["param_groups"][len(optimizer.param_groups) :]:
            if _ORIGIN not in saved:
                return  # somebody else's group, of which torch will say that it is missing
            index, positions = saved[_ORIGIN]
            _split(optimizer, index, [positions] if isinstance(positions, int) else positions, schedulers)

    optimizer.register_load_state_dict_pre_hook(split_like)


def _places(optimizer: Optimizer, parameter: Tensor | Iterable[Tensor]) -> dict[int, list[int]]:
    """Where the weights are: positions in each of the optimizer's groups that has some."""
    weights = [parameter] if isinstance(parameter, Tensor) or not isinstance(parameter, Iterable) else list(parameter)
    for w in weights:
        if not isinstance(w, Tensor):
            raise TypeError(f"`parameter` must be a weight or several, got {type(w).__name__}.")
        if group_of(optimizer, w) is None:
            raise ValueError(
                f"`parameter` must be one of the optimizer's, got one of shape {tuple(w.shape)}. Of a set in several "
                "optimizers, give each its own."
            )
    wanted = {id(w) for w in weights}
    if not len(weights) == len(wanted) > 0:
        raise ValueError(
            f"`parameter` must be at least one weight, and each only once, got {len(weights)} of which {len(wanted)} "
            "are different."
        )
    groups = enumerate(optimizer.param_groups)
    places = {index: [i for i, p in enumerate(group["params"]) if id(p) in wanted] for index, group in groups}
    return {index: positions for index, positions in places.items() if positions}


def _rule(optimizer: Optimizer, group: Group, positions: list[int], others: bool) -> UpdateRule:
    """How the weights at these positions of a group scale; ``others``: whether the optimizer has more weights."""
    name, found = type(optimizer).__name__, find_rule(optimizer, group)
    rule = found.rescaled_as if isinstance(found, NoRule) else found
    if rule is None or rule.state_degrees is None:
        missing = "steps are" if rule is None else "state is"
        why = f": it {found.why}" if rule is None and isinstance(found, NoRule) else ""
        raise ValueError(
            f"`optimizer` must be one whose {missing} known, got {name}{why}. Describe your own by "
            f"register_update_rule({name}, exponent=…, decay=…, state_degrees=…)."
        )
    if isinstance(found, NoRule) and others:
        raise ValueError(f"`parameter` must be all weights of {name}, which has one state for all of them.")
    for position in positions if rule.local == "radam" else ():
        state = optimizer.state.get(group["params"][position], {})
        beta, step = float(group["betas"][1]), 1 + int(state.get("step", 0))
        if 2 / (1 - beta) - 1 - 2 * step * beta**step / (1 - beta**step) <= 5:
            raise ValueError(
                f"`optimizer` must be past its first steps, got a {name} before step {step}, which it does not rectify "
                "yet, and which are proportional to another power of the norm than later ones. Rescale after some more "
                "steps."
            )
    return rule


def _split(optimizer: Optimizer, index: int, positions: Sequence[int], schedulers: Sequence[Scheduler]) -> int:
    """Give some weights of a group a new one together; its index."""
    parent = optimizer.param_groups[index]
    group = {key: copy.deepcopy(value) for key, value in parent.items() if key not in ("params", "param_names")}
    moved: dict[str, list[Any]] = {}
    for key in ("params", "param_names") if parent.get("param_names") else ("params",):
        moved[key] = [parent[key][i] for i in positions]
        parent[key] = [entry for i, entry in enumerate(parent[key]) if i not in positions]
    if "name" in group:
        taken = {g.get("name") for g in optimizer.param_groups}
        tries = (f"{group['name']}-{number}" for number in range(len(taken) + 1))
        group["name"] = next(name for name in tries if name not in taken)
    group[_ORIGIN] = (index, list(positions))
    params = (
        list(zip(moved["param_names"], moved["params"], strict=True)) if "param_names" in moved else moved["params"]
    )
    optimizer.add_param_group(group | {"params": params})
    _scheduler_rates.add_group(schedulers, index, len(optimizer.param_groups) - 1)
    return len(optimizer.param_groups) - 1


def _rate(rule: UpdateRule) -> float:
    """Power of the norm by which the learning rate goes."""
    return float(rule.exponent if rule.lr_degree is None else rule.lr_degree)


def _multiply(
    optimizer: Optimizer, index: int, rule: UpdateRule, factor: float, schedulers: Sequence[Scheduler]
) -> None:
    """Multiply all weights of a group, and let everything follow."""
    group, rate = optimizer.param_groups[index], _rate(rule)
    for w in group["params"]:
        w.mul_(factor)
        if w.grad is not None:
            w.grad.div_(factor)
        multiply_state(optimizer, w, rule, factor)
    decay = {"coupled": -2.0, "decoupled": -rate, "none": 0.0}[rule.decay]
    degrees: dict[str, Any] = {"weight_decay": decay if rule.decay_degree is None else rule.decay_degree}
    degrees |= dict.fromkeys((rule.lr_key, *_scheduler_rates.GROUP_RATES), rate)
    for key, degree in {**degrees, **rule.group_degrees}.items():
        if key in group:
            group[key] = _scaled(group[key], factor, degree, group)
    _scheduler_rates.multiply_rates(schedulers, index, factor**rate)


def multiply_state(optimizer: Optimizer, parameter: Tensor, rule: UpdateRule, factor: float) -> None:
    """Make the state of a parameter what it would be had that been so many times as large in all steps."""
    state = optimizer.state.get(parameter, {})
    for key, power in {**rule.state_powers(parameter.ndim), **rule.rate_degrees}.items():
        if key in state:
            state[key] = _times(state[key], factor**power)


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [_times(v, factor) for v in value]
    return value.mul_(factor) if isinstance(value, Tensor) else value * factor


def _scaled(value: Any, factor: float, degree: Any, group: Group) -> Any:
    if isinstance(degree, tuple):
        return type(value)(_scaled(v, factor, d, group) for v, d in zip(value, degree, strict=True))
    power = degree(group) if callable(degree) else degree
    return value * factor**power if power else value  # a new tensor: groups share the one they were made with
