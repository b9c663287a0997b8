"""What decides about effective learning rates, as hyperparameters that loggers can show beside the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_normreg._optimizers import update_rule

SETTINGS = ("lr", "weight_decay", "momentum", "betas", "nesterov")
MERGING = ("WandbLogger", "MLFlowLogger", "CometLogger", "NeptuneLogger")
"""Loggers that add to what they have. Others may replace it, or write the file that a model is loaded with again."""


def hyperparameters(optimizers: Sequence[Optimizer], radii: Iterable[object]) -> dict[str, str | float]:
    """Optimizer, exponent p, its settings, and the radius of projection; by the group's name where groups differ.

    >>> import torch
    >>> weight, gain = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    >>> groups = [{"params": [weight], "name": "weight"}, {"params": [gain], "name": "gamma", "weight_decay": 0.0}]
    >>> found = hyperparameters([torch.optim.SGD(groups, lr=0.1, weight_decay=0.01)], [1.0])
    >>> found["normreg/optimizer"], found["normreg/scale_exponent"], found["normreg/lr"]
    ('SGD', 2, 0.1)
    >>> found["normreg/weight_decay/weight"], found["normreg/weight_decay/gamma"], found["normreg/radius"]
    (0.01, 0.0, '1.0')
    """
    found: dict[str, str | float] = {}
    for number, optimizer in enumerate(optimizers):
        start = f"normreg/{number}/" if len(optimizers) > 1 else "normreg/"
        found[f"{start}optimizer"] = type(optimizer).__name__
        rules = [update_rule(optimizer, group) for group in optimizer.param_groups]
        _add(found, f"{start}scale_exponent", optimizer, [None if rule is None else rule.exponent for rule in rules])
        for key in SETTINGS:
            initial = f"initial_{key}"  # a scheduler keeps the learning rate that it starts from
            _add(found, f"{start}{key}", optimizer, [g.get(initial, g.get(key)) for g in optimizer.param_groups])
    for radius in radii:
        found["normreg/radius"] = str(radius)
    return found


def _add(found: dict[str, str | float], key: str, optimizer: Optimizer, values: list[Any]) -> None:
    plain = [_plain(value) for value in values]
    for number, (group, value) in enumerate(zip(optimizer.param_groups, plain, strict=True)):
        if value is not None:
            same = all(other == value for other in plain)
            found[key if same else f"{key}/{group.get('name', number)}"] = value


def _plain(value: Any) -> str | float | None:
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value) if isinstance(value, (tuple, list)) else float(value)
