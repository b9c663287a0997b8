"""Multiplying a weight while it trains, so that its directions go on as if nothing had happened.

It gets a parameter group of its own, also in a run that is resumed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._optimizers import Group, NoRule, UpdateRule, find_rule, group_of
from lightning_normreg._param_groups import _scheduler_rates
from lightning_normreg._param_groups._scheduler_rates import Scheduler

# Key in a group that was split off: index of the group that it was in, and its position there at that time.
_ORIGIN = "split_from"


@torch.no_grad()
def rescale_(
    optimizer: Optimizer, parameter: Tensor, factor: float, *, schedulers: Sequence[Scheduler] = ()
) -> dict[str, Any]:
    """Multiply a scale-invariant weight by c while it trains, without a change to where its direction goes.

    Gradients of the weight are multiplied by 1/c from then on. Its gradient and its optimizer's state are multiplied
    by the power of c by which they go, the learning rate by c^p, weight decay by c^−2 (coupled) or c^−p (decoupled),
    and eps and other absolute constants by theirs. As these belong to a parameter group, the weight gets one of its
    own, split off from that which it was in, unless it is alone there.

    Directions then agree to rounding; Muon and SOAP round to lower precision inside. One eps that stands in two places,
    as in AdamP and LAMB, follows where it counts more. What is outside of the optimizer does not follow: clipping by
    the norm of all gradients, and copies of the weight, as averages keep them.

    Args:
        optimizer: Its optimizer, of torch or of a package whose rule is known.
        parameter: The weight. All of it must be scale-invariant, as one or in units that are all multiplied alike.
        factor: c, positive.
        schedulers: All learning-rate schedulers of the optimizer. They follow.

    Returns:
        The weight's parameter group.

    Raises:
        TypeError: If ``optimizer`` is no ``torch.optim.Optimizer``, or a scheduler is none of torch's own.
        ValueError: If ``factor`` is not a positive number, ``parameter`` is not the optimizer's, how its optimizer
            scales is not known, or its state or a scheduler cannot follow. Nothing has changed then.

    Examples:
        >>> weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        >>> optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5, eps=1e-8)
        >>> group = rescale_(optimizer, weights[0], 4.0)
        >>> weights[0].detach(), group["lr"], group["weight_decay"], group["eps"]
        (tensor([4., 4.]), 0.4, 0.125, 2.5e-09)

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
    group = group_of(optimizer, parameter)
    if group is None:
        raise ValueError(f"`parameter` must be one of the optimizer's, got one of shape {tuple(parameter.shape)}.")
    factor, rule = float(factor), _rule(optimizer, group, parameter)
    rate = rule.exponent if rule.lr_degree is None else rule.lr_degree
    _scheduler_rates.check_schedulers(optimizer, schedulers, rates=bool(rate))

    groups = optimizer.param_groups
    index = next(number for number, other in enumerate(groups) if other is group)
    if len(group["params"]) > 1:
        position = next(place for place, p in enumerate(group["params"]) if p is parameter)
        _split(optimizer, index, position, schedulers)
        index, group = len(groups) - 1, groups[-1]
    parameter.mul_(factor)
    if parameter.grad is not None:
        parameter.grad.div_(factor)
    multiply_state(optimizer, parameter, rule, factor)
    decay = {"coupled": -2.0, "decoupled": -float(rate), "none": 0.0}[rule.decay]
    degrees: dict[str, Any] = {"weight_decay": decay if rule.decay_degree is None else rule.decay_degree}
    degrees |= dict.fromkeys((rule.lr_key, *_scheduler_rates.GROUP_RATES), float(rate))
    for key, degree in {**degrees, **rule.group_degrees}.items():
        if key in group:
            group[key] = _scaled(group[key], factor, degree, group)
    _scheduler_rates.multiply_rates(schedulers, index, factor**rate)
    return group


def accept_rescaled(optimizer: Optimizer, schedulers: Sequence[Scheduler] = ()) -> None:
    """Let a fresh optimizer load the state of a run in which weights were rescaled.

    :func:`rescale_` gives a weight a parameter group of its own. A fresh optimizer does not have that group, and
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
            index, position = saved[_ORIGIN]
            _split(optimizer, index, position, schedulers)

    optimizer.register_load_state_dict_pre_hook(split_like)


def _rule(optimizer: Optimizer, group: Group, parameter: Tensor) -> UpdateRule:
    name, found, state = type(optimizer).__name__, find_rule(optimizer, group), optimizer.state.get(parameter)
    rule = found.rescaled_as if isinstance(found, NoRule) else found
    if rule is None or rule.state_degrees is None:
        missing = "steps are" if rule is None else "state is"
        why = f": it {found.why}" if rule is None and isinstance(found, NoRule) else ""
        raise ValueError(
            f"`optimizer` must be one whose {missing} known, got {name}{why}. Describe your own by "
            f"register_update_rule({name}, exponent=…, decay=…, state_degrees=…)."
        )
    if isinstance(found, NoRule) and sum(len(g["params"]) for g in optimizer.param_groups) > 1:
        raise ValueError(f"`parameter` must be the only one of {name}, which has one state for all of them.")
    if rule.local == "radam":
        beta, step = float(group["betas"][1]), 1 + int((state or {}).get("step", 0))
        if 2 / (1 - beta) - 1 - 2 * step * beta**step / (1 - beta**step) <= 5:
            raise ValueError(
                f"`optimizer` must be past its first steps, got a {name} before step {step}, which it does not rectify "
                "yet, and which are proportional to another power of the norm than later ones. Rescale after some more "
                "steps."
            )
    return rule


def _split(optimizer: Optimizer, index: int, position: int, schedulers: Sequence[Scheduler]) -> None:
    parent = optimizer.param_groups[index]
    names: list[str] = parent.get("param_names", [])
    group = {key: copy.deepcopy(value) for key, value in parent.items() if key not in ("params", "param_names")}
    parameter = parent["params"][position]
    parent["params"] = [p for p in parent["params"] if p is not parameter]
    if names:
        parent["param_names"] = names[:position] + names[position + 1 :]
    if "name" in group:
        taken = {g.get("name") for g in optimizer.param_groups}
        tries = (f"{group['name']}-{number}" for number in range(len(taken) + 1))
        group["name"] = next(name for name in tries if name not in taken)
    group[_ORIGIN] = (index, position)
    optimizer.add_param_group(group | {"params": [(names[position], parameter)] if names else [parameter]})
    _scheduler_rates.add_group(schedulers, index, len(optimizer.param_groups) - 1)


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
