"""What is written down of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from lightning_normreg.functional._families import FamilyName

Decay = Literal["coupled", "decoupled", "none"]
Group = dict[str, Any]
Degree = int | tuple[int, ...] | Callable[[Group], float]
StateDegree = int | Callable[[int], float]
Local = Literal["exact", "adam", "radam", "nadam", "rmsprop", "adagrad", "adadelta", "adafactor", "unknown"]


@dataclass(frozen=True)
class UpdateRule:
    """How one optimizer steps, in one parameter group.

    A degree is the power of c by which something goes when a scale-invariant weight is multiplied by c and nothing
    else about its run is to change: gradients have degree −1.
    """

    exponent: int  # p: the update of a scale-invariant weight is proportional to ‖w‖^(1−p), its rotation to lr/‖w‖^p
    decay: Decay  # "coupled": added to the gradient; "decoupled": shrinks the weight itself
    family: FamilyName | Literal[""] = ""  # formulas by which its equilibrium with decay is computed
    lr_key: str = "lr"  # of the parameter group, under which the learning rate is set
    used_lr_key: str = ""  # under which the optimizer keeps the learning rate of its last step, where that differs
    lr_factor_keys: tuple[str, ...] = ()  # of further factors of the learning rate
    lr_is_used: bool = True  # whether steps depend on the learning rate at all
    momentum_key: str = ""  # of the β of a momentum that sums gradients up; "" where it averages them, or has none
    local: Local = "unknown"  # how the exponent of single steps differs from p, see `scale_exponent`
    # Degrees of entries of the state, where need be as a function of the weight's number of dimensions; None where the
    # state cannot be rescaled.
    state_degrees: Mapping[str, StateDegree] | None = field(default_factory=dict)
    # Of state that is, or is proportional to, a learning rate.
    rate_degrees: Mapping[str, int] = field(default_factory=dict)
    lr_degree: int | None = None  # None for p
    decay_degree: int | None = None  # None for −2 (coupled) and −p (decoupled)
    group_degrees: Mapping[str, Degree] = field(default_factory=dict)  # of other settings, or of each of a tuple
    # Other rules, each under the condition that an entry of the parameter group, or else an attribute of the optimizer,
    # is true. The first that is met counts.
    variants: tuple[tuple[str, UpdateRule | NoRule], ...] = ()
    note: str = ""  # what else there is to say, as a sentence without its subject

    def given(self, **variants: UpdateRule | NoRule) -> UpdateRule:
        """The same rule with variants that come before those it has."""
        return replace(self, variants=(*variants.items(), *self.variants))

    def lr(self, group: Group) -> float | Tensor:
        """Learning rate of a parameter group as it stands now."""
        used = group.get(self.used_lr_key, 0.0)  # 0 before the first step
        value: float | Tensor = used if isinstance(used, Tensor) or used > 0 else group[self.lr_key]
        for key in self.lr_factor_keys:
            value = value * group[key]
        return value

    def momentum_gain(self, group: Group) -> float:
        """By how much more than one step's the gradients move the weight in the end, as momentum repeats them.

        (1 − τ)/(1 − β) with momentum β and dampening τ, 1/(1 − β) with Nesterov's, 1 where momentum is an average.
        """
        beta = float(group.get(self.momentum_key, 0.0))
        if not beta:
            return 1.0
        gain = (1 - float(group.get("dampening", 0.0))) / (1 - beta)
        return 1 + beta * gain if group.get("nesterov") else gain

    def decay_gain(self, group: Group) -> float | None:
        """What decay takes off a weight in a step, over lr·decay; None in the gradient of Adam and its kind.

        There it is divided by the gradient's size.
        """
        if self.decay == "decoupled":
            return 1.0
        return self.momentum_gain(group) if self.family in ("sgd", "nesterov") else None

    def state_powers(self, dimensions: int) -> dict[str, float]:
        """Degree of each entry of the state that a weight with so many dimensions has."""
        degrees = self.state_degrees or {}
        return {key: degree(dimensions) if callable(degree) else degree for key, degree in degrees.items()}

    def decay_is_radial(self, group: Group) -> bool:
        """Whether decay only makes weights shorter, so that a step turns them as it would without it."""
        remembers = "z" in (self.state_degrees or {})  # a second copy of the weights, which decay moves as well
        plain = self.family == "sgd" and not group.get(self.momentum_key)
        return (self.decay == "decoupled" or plain) and not remembers


@dataclass(frozen=True)
class NoRule:
    """An optimizer that is known to have no exponent."""

    why: str  # as a sentence that follows the optimizer's name
    rescaled_as: UpdateRule | None = None  # a rule whose degrees hold nevertheless
