"""Facts about optimizers, as data: how a step depends on the weight's scale, and what decay does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

Decay = Literal["coupled", "decoupled", "none"]


@dataclass(frozen=True)
class UpdateRule:
    """How one optimizer steps.

    Attributes:
        exponent: p: the update of a scale-invariant weight goes with ‖w‖^(1−p), so its rotation with lr/‖w‖^p.
        decay: ``"coupled"``: added to the gradient; ``"decoupled"``: shrinks the weight itself; ``"none"``.
        lr_key: Key of the parameter group under which the learning rate is read.
        decoupled_key: Key of the parameter group that, when true, makes the decay decoupled; "" where there is none.
        state_degrees: Power of c by which an entry of the optimizer's state goes when a scale-invariant weight is
            multiplied by c: gradients go with 1/c.
    """

    exponent: int
    decay: Decay
    lr_key: str = "lr"
    decoupled_key: str = ""
    state_degrees: Mapping[str, int] = field(default_factory=dict)

    def lr(self, group: dict[str, Any]) -> float | Tensor:
        """Learning rate of a parameter group as it stands now."""
        value: float | Tensor = group[self.lr_key]
        return value

    def decay_of(self, group: dict[str, Any]) -> Decay:
        """Kind of weight decay that a parameter group asks for."""
        return "decoupled" if group.get(self.decoupled_key) else self.decay


_SGD_STATE = {"momentum_buffer": -1}
_ADAM_STATE = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
_RMSPROP_STATE = {"square_avg": -2, "grad_avg": -1}  # its momentum is of steps, not of gradients

_RULES: dict[type[Optimizer], UpdateRule] = {
    SGD: UpdateRule(exponent=2, decay="coupled", state_degrees=_SGD_STATE),
    Adam: UpdateRule(1, "coupled", decoupled_key="decoupled_weight_decay", state_degrees=_ADAM_STATE),
    AdamW: UpdateRule(exponent=1, decay="decoupled", state_degrees=_ADAM_STATE),
    RMSprop: UpdateRule(exponent=1, decay="coupled", state_degrees=_RMSPROP_STATE),
}


def update_rule(optimizer: Optimizer) -> UpdateRule | None:
    """Rule of an optimizer, or None for one that nobody has described.

    A subclass shares the rule of its parent only while it shares its ``step``: one that computes its own step may
    scale differently, and no number is better than a wrong one.
    """
    for parent in type(optimizer).__mro__:
        if parent in _RULES:
            return _RULES[parent] if _same_step(type(optimizer), parent) else None
    return None


def _same_step(cls: type[Optimizer], parent: type[Optimizer]) -> bool:
    # torch wraps `step` in a profiler hook once per class, hence the unwrapping.
    return inspect.unwrap(cls.step) is inspect.unwrap(parent.step)


def register_update_rule(optimizer_class: type[Optimizer], *, exponent: int, decay: Decay, lr_key: str = "lr") -> None:
    """Describe an optimizer, so that monitors can give its effective learning rate lr/‖w‖^p.

    Args:
        optimizer_class: The class of the optimizer; a rule that was there is replaced.
        exponent: p, how many powers of ‖w‖ the rotation per step loses: 2 where the update is linear in the gradient
            (SGD family), 1 where it does not depend on the gradient's size (Adam, Lion, Muon), 0 where it already
            scales with the weight (LARS, LAMB).
        decay: ``"coupled"`` (added to the gradient), ``"decoupled"`` or ``"none"``.
        lr_key: Key of the parameter group that holds the learning rate.

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
    _RULES[optimizer_class] = UpdateRule(exponent, decay, lr_key)
