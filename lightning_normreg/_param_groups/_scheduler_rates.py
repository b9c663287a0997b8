"""What learning-rate schedulers keep of each parameter group, and how high they will take it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from types import MethodType, SimpleNamespace
from typing import Any

from torch.optim import Optimizer, lr_scheduler, swa_utils

Scheduler = Any  # ReduceLROnPlateau was no LRScheduler in older versions of torch

# Lists with one entry for each parameter group, of learning rates and of what is none.
_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_OTHERS = ("lr_lambdas", "base_momentums", "max_momentums")
# Learning rates that schedulers keep in the parameter groups themselves.
GROUP_RATES = ("initial_lr", "max_lr", "min_lr", "swa_lr")

_NAMES = (
    "ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR LambdaLR "
    "LinearLR MultiplicativeLR MultiStepLR OneCycleLR PolynomialLR ReduceLROnPlateau SequentialLR StepLR"
)
_KNOWN = {swa_utils.SWALR, *(getattr(lr_scheduler, name) for name in _NAMES.split())}
_AHEAD = 100_000
"""Steps that a schedule is run ahead for at most."""


def flatten(schedulers: Iterable[Scheduler]) -> list[Scheduler]:
    """Schedulers, and those that they are made of."""
    found = []
    for scheduler in schedulers:
        found += [scheduler, *flatten(getattr(scheduler, "_schedulers", ()))]
    return found


def check_schedulers(optimizer: Optimizer, schedulers: Sequence[Scheduler], rates: bool) -> None:
    """Refuse schedulers that cannot follow a new group, or (``rates``) a change to the learning rate of one group."""
    if not schedulers and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            f"`schedulers` must name the learning-rate schedulers of this {type(optimizer).__name__}, got none. They "
            "keep lists with an entry for each parameter group, which must follow."
        )
    for scheduler in flatten(schedulers):
        name = type(scheduler).__name__
        if type(scheduler) not in _KNOWN:
            raise TypeError(
                f"`schedulers` must be those of torch.optim, got {name}, of which it is not known what it keeps of "
                "each parameter group. Use a LambdaLR instead."
            )
        if scheduler.optimizer is not optimizer:
            raise ValueError(f"`schedulers` must be those of `optimizer`, got a {name} of another one.")
        lowest: float = getattr(scheduler, "eta_min", 0.0)
        if rates and lowest:
            raise ValueError(
                f"`eta_min` of {name} must be 0, got {lowest}: it is a learning rate for all parameter "
                "groups, and one of them is to change. Use a LambdaLR instead."
            )


def add_group(schedulers: Iterable[Scheduler], parent: int, index: int) -> None:
    """Let schedulers know of a group that was split off from another one; it is the last."""
    for scheduler in flatten(schedulers):
        for key in _RATES + _OTHERS:
            entries = getattr(scheduler, key, None)
            if isinstance(entries, list) and len(entries) == index:  # else it was loaded with its entry already
                setattr(scheduler, key, [*entries, entries[parent]])


def select_groups(state: dict[str, Any], sources: Sequence[int], count: int) -> None:
    """Change the saved state of a scheduler, in place, from ``count`` groups to others, each made from one of them."""
    for key in _RATES + _OTHERS:
        entries = state.get(key)
        if isinstance(entries, list) and len(entries) == count:
            state[key] = [entries[source] for source in sources]
    for inner in state.get("_schedulers", ()):
        select_groups(inner, sources, count)


def multiply_rates(schedulers: Iterable[Scheduler], index: int, factor: float) -> None:
    for scheduler in flatten(schedulers):
        for key in _RATES:
            entries = getattr(scheduler, key, None)
            if isinstance(entries, list):
                setattr(scheduler, key, [e * factor if i == index else e for i, e in enumerate(entries)])


def highest_rates(
    optimizer: Optimizer, schedulers: Sequence[tuple[Scheduler, Callable[[int], bool]]], steps: range
) -> list[float]:
    """The highest learning rate of each group in the coming steps, at most 100 000 of them.

    Copies of the schedulers are run ahead, with a stand-in for the optimizer, so nothing is changed. What a LambdaLR
    calls is called, on numbers of steps.

    Args:
        optimizer: The optimizer.
        schedulers: Each of its schedulers, and whether that is stepped after a step.
        steps: Numbers of the coming steps.

    Raises:
        TypeError: If one of them is not torch's own, or follows a metric.
    """
    for scheduler in flatten(scheduler for scheduler, _ in schedulers):
        if not _steps_like_torch(scheduler) or isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            raise TypeError(f"what {type(scheduler).__name__} will do is not known beforehand")
    groups = [
        deepcopy({k: v for k, v in g.items() if k not in ("params", "param_names")}) for g in optimizer.param_groups
    ]
    # The attributes keep a scheduler quiet that has not been stepped yet.
    stand_in = SimpleNamespace(param_groups=groups, step=SimpleNamespace(_wrapped_by_lr_sched=True), _opt_called=True)
    memo: dict[int, Any] = {id(optimizer): stand_in}
    for scheduler in flatten(scheduler for scheduler, _ in schedulers):
        memo[id(scheduler.optimizer)] = stand_in
        # Copying a method copies its object, which may be the model.
        memo |= {id(f): f for f in getattr(scheduler, "lr_lambdas", ()) if isinstance(f, MethodType)}
    copies = [(deepcopy(scheduler, memo), is_due) for scheduler, is_due in schedulers]
    highest = [float(group["lr"]) for group in groups]
    for step in steps[:_AHEAD][:-1]:  # after the last one no learning rate is used
        due = [copy for copy, is_due in copies if is_due(step)]
        for copy in due:
            copy.step()
        if due:
            highest = [max(rate, float(group["lr"])) for rate, group in zip(highest, groups, strict=True)]
    return highest


def _steps_like_torch(scheduler: Scheduler) -> bool:
    """Whether it is torch's own, or a subclass that is only made in another way."""
    parents = [cls for cls in type(scheduler).__mro__ if cls in _KNOWN]
    names = ("step", "get_lr", "_get_closed_form_lr")
    return any(all(getattr(type(scheduler), n, None) is getattr(cls, n, None) for n in names) for cls in parents[:1])
