"""A parameter group of its own for one parameter, in the middle of training and when that is resumed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._param_groups._scheduler_rates import Scheduler, add_group, check_schedulers

# Key in a group that was split off: index of the group that it was in, and its position there at that time.
_ORIGIN = "split_from"


def split_off(optimizer: Optimizer, parameter: Tensor, schedulers: Sequence[Scheduler]) -> int:
    """Index of the group that a parameter has for itself; it is split off unless it is alone in its group."""
    groups = optimizer.param_groups
    ((index, position),) = (
        (g, position) for g, group in enumerate(groups) for position, p in enumerate(group["params"]) if p is parameter
    )
    if len(groups[index]["params"]) == 1:
        return index
    _split(optimizer, index, position, schedulers)
    return len(groups) - 1


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
    check_schedulers(optimizer, schedulers, rates=False)

    def split_like(optimizer: Optimizer, state: dict[str, Any]) -> None:
        for saved in state["param_groups"][len(optimizer.param_groups) :]:
            if _ORIGIN not in saved:
                return  # somebody else's group, of which torch will say that it is missing
            index, position = saved[_ORIGIN]
            _split(optimizer, index, position, schedulers)

    optimizer.register_load_state_dict_pre_hook(split_like)


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
    add_group(schedulers, index, len(optimizer.param_groups) - 1)
