"""From an optimizer to its rule."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._compat import is_named
from lightning_normreg._optimizers._packages import RULES
from lightning_normreg._optimizers._rule import Decay, Group, NoRule, UpdateRule

_REGISTERED: dict[type[Optimizer], UpdateRule] = {}


def update_rule(optimizer: Optimizer, group: Group | None = None) -> UpdateRule | None:
    """Rule of an optimizer in a parameter group, by default its first, or None where nobody has described it.

    A subclass shares the rule of its parent only while it shares its ``step``: one that computes its own step may
    scale differently, and no number is better than a wrong one.
    """
    rule = find_rule(optimizer, group)
    return rule if isinstance(rule, UpdateRule) else None


def why_no_rule(optimizer: Optimizer, group: Group | None = None) -> str:
    """What is known of an optimizer that has no rule, as a sentence that follows its name; "" for nothing."""
    rule = find_rule(optimizer, group)
    return rule.why if isinstance(rule, NoRule) else ""


def group_of(optimizer: Optimizer, parameter: Tensor) -> Group | None:
    return next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)


def unequal(optimizer: Optimizer, parameters: Iterable[Tensor], *keys: str) -> list[str]:
    """Settings that some parameters do not have in common, or ``"optimizer"``; tensors on a device are not read."""
    found = [group_of(optimizer, p) for p in parameters]
    groups = [g for g in found if g is not None]
    if len(groups) < len(found):
        return ["optimizer"]
    return [key for key in keys if not all(_same(g.get(key), groups[0].get(key)) for g in groups)]


def _same(a: Any, b: Any) -> bool:
    unread = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (a, b))
    return a is b or unread or bool(a == b)


def find_rule(optimizer: Optimizer, group: Group | None = None) -> UpdateRule | NoRule | None:
    """Rule of an optimizer, or what is known instead."""
    optimizer = acting(optimizer)
    lineage: tuple[type[Optimizer], ...] = type(optimizer).__mro__
    for parent in lineage:
        rule = _REGISTERED.get(parent) or _listed(_dotted(parent))
        if rule is not None:
            group = optimizer.param_groups[0] if group is None else group
            # torch wraps `step` in a profiler hook once per class, hence the unwrapping.
            same_step = inspect.unwrap(type(optimizer).step) is inspect.unwrap(parent.step)
            return _in_group(rule, optimizer, group) if same_step else None
    return None


def acting(optimizer: Optimizer) -> Optimizer:
    """The optimizer that computes the step: ZeroRedundancyOptimizer has one for this rank's share of the parameters."""
    inner = getattr(optimizer, "optim", None)
    shares = is_named(optimizer, "ZeroRedundancyOptimizer")
    return inner if shares and isinstance(inner, Optimizer) else optimizer


def named_rules(name: str, group: Group) -> list[UpdateRule | NoRule]:
    """Rules that an optimizer may have, judging by its class's name and the settings of a parameter group alone.

    The class is one of torch.optim, or a dotted path such as ``"lion_pytorch.Lion"``; nothing is imported. Empty for an
    unknown name; several where an attribute of the optimizer decides, which a group does not say.
    """
    dotted = name if "." in name else f"torch.optim.{name}"
    registered = [rule for cls, rule in _REGISTERED.items() if _dotted(cls) == dotted]
    rule = registered[0] if registered else _listed(dotted)
    # All that decides is in the groups of torch's own; a setting that an old one lacks is off.
    return [] if rule is None else _possible(rule, group, complete=dotted.startswith("torch."))


def _possible(rule: UpdateRule | NoRule, group: Group, complete: bool) -> list[UpdateRule | NoRule]:
    found: list[UpdateRule | NoRule] = []
    for key, variant in rule.variants if isinstance(rule, UpdateRule) else ():
        if group.get(key) or not (key in group or complete):
            found += _possible(variant, group, complete)
            if key in group:
                return found
    return [*found, rule]


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _listed(dotted: str) -> UpdateRule | NoRule | None:
    package, _, rest = dotted.partition(".")
    names = RULES.get(package, {})
    parts = rest.split(".")
    return next((names[key] for start in range(len(parts)) if (key := ".".join(parts[start:])) in names), None)


def _in_group(rule: UpdateRule | NoRule, optimizer: Optimizer, group: Group) -> UpdateRule | NoRule:
    if isinstance(rule, UpdateRule):
        for key, variant in rule.variants:
            if group.get(key, getattr(optimizer, key, False)):
                return _in_group(variant, optimizer, group)
    return rule


def register_update_rule(
    optimizer_class: type[Optimizer],
    *,
    exponent: int,
    decay: Decay,
    lr_key: str = "lr",
    state_degrees: Mapping[str, int] | None = None,
    group_degrees: Mapping[str, int] | None = None,
) -> None:
    """Describe an optimizer, so that monitors can give its effective learning rate lr/‖w‖^p.

    Args:
        optimizer_class: The class of the optimizer; a rule that was there is replaced.
        exponent: p, how many powers of ‖w‖ the rotation per step loses: 2 where the update is linear in the gradient
            (SGD family), 1 where it does not depend on the gradient's size (Adam, Lion, Muon), 0 where it already
            scales with the weight (LARS, LAMB).
        decay: ``"coupled"`` (added to the gradient), ``"decoupled"`` or ``"none"``.
        lr_key: Key of the parameter group that holds the learning rate.
        state_degrees: For each entry of the optimizer's state that depends on the weight's scale, the power of c by
            which it goes when the weight is multiplied by c: −1 for averages of gradients, −2 of their squares. Needed
            only where a weight is rescaled while it trains.
        group_degrees: The same for absolute constants in the parameter group, such as −1 for Adam's eps.

    Raises:
        TypeError: If ``optimizer_class`` is no subclass of ``torch.optim.Optimizer``.
        ValueError: If ``exponent`` is not 0, 1 or 2, or ``decay`` is unknown.

    Examples:
        >>> class SignSGD(Optimizer):
        ...     '''Steps by lr times the sign of the gradient.'''
        >>> register_update_rule(SignSGD, exponent=1, decay="none")

    Reference:
        van Laarhoven 2017, https://arxiv.org/abs/1706.05350, for the exponents 2 and 1.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"`optimizer_class` must be a subclass of torch.optim.Optimizer, got {optimizer_class!r}.")
    if exponent not in (0, 1, 2):
        raise ValueError(f"`exponent` must be 0, 1 or 2, got {exponent!r}.")
    if decay not in ("coupled", "decoupled", "none"):
        raise ValueError(f'`decay` must be "coupled", "decoupled" or "none", got {decay!r}.')
    _REGISTERED[optimizer_class] = UpdateRule(
        exponent, decay, lr_key=lr_key, state_degrees=state_degrees, group_degrees=group_degrees or {}
    )
