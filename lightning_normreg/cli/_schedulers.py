"""Learning-rate schedules made of several, in a form that YAML can say."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CyclicLR, LRScheduler, OneCycleLR, SequentialLR

from lightning_normreg._param_groups import DecayFreeLR

MakeScheduler = Callable[[Optimizer], LRScheduler]


class SchedulerSequence(SequentialLR):
    """One schedule after another: torch's ``SequentialLR``, which makes its schedulers itself.

    Args:
        optimizer: The optimizer.
        schedulers: What makes each scheduler; in YAML a class path with its arguments, without the optimizer.
        milestones: Step at which each but the first begins, in the unit of ``--lr_interval``.

    Raises:
        ValueError: If there are not as many schedulers as milestones and one.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from torch.optim.lr_scheduler import ConstantLR, LinearLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
        >>> parts = [partial(LinearLR, start_factor=0.25, total_iters=3), partial(ConstantLR, factor=0.5)]
        >>> schedule = SchedulerSequence(optimizer, parts, [3])
        >>> for _ in range(4):
        ...     print(round(schedule.get_last_lr()[0], 3))
        ...     optimizer.step()
        ...     schedule.step()
        0.1
        0.2
        0.3
        0.2
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[MakeScheduler], milestones: list[int]) -> None:
        super().__init__(optimizer, [make(optimizer) for make in schedulers], milestones)


class SchedulerChain(ChainedScheduler):
    """Schedules whose factors multiply: torch's ``ChainedScheduler``, which makes its schedulers itself.

    Args:
        optimizer: The optimizer.
        schedulers: What makes each scheduler; in YAML a class path with its arguments, without the optimizer.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from torch.optim.lr_scheduler import ConstantLR, ExponentialLR
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = SchedulerChain(optimizer, [partial(ConstantLR, factor=0.1), partial(ExponentialLR, gamma=0.5)])
        >>> round(schedule.get_last_lr()[0], 3)
        0.1
        >>> optimizer.step()
        >>> schedule.step()
        >>> round(schedule.get_last_lr()[0], 3)
        0.05
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[MakeScheduler]) -> None:
        super().__init__([make(optimizer) for make in schedulers], optimizer)


def natural_interval(scheduler: object) -> str:
    """``"step"`` for schedules that are made for steps of the optimizer, alone or as parts; else ``"epoch"``."""
    parts = [scheduler, *getattr(scheduler, "_schedulers", ())]
    return "step" if any(isinstance(part, (OneCycleLR, CyclicLR, DecayFreeLR)) for part in parts) else "epoch"
