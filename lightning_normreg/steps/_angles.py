"""The angle that each weight is to turn by in a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._optimizers import Group, unequal, update_rule
from lightning_normreg._weights import Watched, in_words, listed
from lightning_normreg.functional import equilibrium_rotation
from lightning_normreg.functional._rotation import check_angle
from lightning_normreg.steps._formulas import Formulas
from lightning_normreg.steps._tracker import Stepping, as_column

Angle = float | Literal["lr", "equilibrium"]

_NEED_GRADIENT = ("adam_l2", "rmsprop_l2")
"""Families whose rotation under decay depends on the size of the gradients."""


class Angles:
    """Angles from what the user asked for and what the optimizers' groups say now.

    Args:
        angle: ``"lr"``: the group's learning rate; ``"equilibrium"``: what the weight would turn by in a step at the
            equilibrium of the group's learning rate and decay; radians; or what says them by the weight's name.
    """

    def __init__(self, angle: Angle | Callable[[str], float]) -> None:
        if isinstance(angle, str):
            if angle not in ("lr", "equilibrium"):
                raise ValueError(f"`angle` must be 'lr', 'equilibrium' or a number, got {angle!r}.")
        elif not callable(angle):
            check_angle(angle)
        self._angle = angle
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def tensor(self, stepping: Stepping, like: Tensor) -> Tensor:
        """Angle of each weight in the step just made, on the device of ``like``.

        Raises:
            ValueError: If a learning rate that is a number is no angle below π.
        """
        return self.numbers([self._of(*one) for one in stepping], like)

    def numbers(self, values: Sequence[float | Tensor], like: Tensor) -> Tensor:
        """Numbers, some of which may be on a device already, as one tensor; the device is not waited for."""
        if any(isinstance(value, Tensor) for value in values):
            return as_column(values, like)
        key = (like.device, like.dtype, *values)
        if key not in self._kept:
            self._kept = {key: as_column(values, like)}
        return self._kept[key]

    def _of(self, watched: Watched, group: Group, optimizer: Optimizer) -> float | Tensor:
        if self._angle == "lr":
            lr: float | Tensor = group["lr"]
            if not isinstance(lr, Tensor) and not 0 <= lr < math.pi:
                raise ValueError(_too_large(lr, group))
            return lr
        if self._angle == "equilibrium":
            return self._equilibrium(watched, group, optimizer)
        return self._angle(watched.name) if callable(self._angle) else self._angle

    def _equilibrium(self, watched: Watched, group: Group, optimizer: Optimizer) -> float:
        rule = update_rule(optimizer, group)
        if rule is None or not rule.family or rule.family in _NEED_GRADIENT:
            raise ValueError(
                f"`angle` must be computable from the recipe for 'equilibrium', but what {type(optimizer).__name__} "
                "turns a weight by under decay depends on its gradients, or is not known. Give a number, such as the "
                "`rotation` that EffectiveLRMonitor shows."
            )
        lr, decay = float(rule.lr(group)), float(group.get("weight_decay", 0.0))
        if lr == 0 and decay:
            return 0.0
        lr = lr or 1.0  # without decay there is no such angle, whatever a warm-up starts from
        settings = Formulas(rule, group, watched, None).settings
        settings.pop("entries", None)  # no rotation depends on them without a gradient's size
        hashable = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in settings.items())
        try:
            return _rotation(rule.family, lr, decay, hashable)
        except ValueError as error:
            raise ValueError(f"`angle='equilibrium'` is that of weight decay at {watched.name!r}: {error}") from None

    def check(self, stepping: Stepping) -> None:
        """Raise a ``ValueError`` where the angle cannot be had. Reads the device."""
        for watched, group, optimizer in stepping:
            keys = {"lr": ["lr"], "equilibrium": ["lr", "weight_decay"]}.get(str(self._angle), [])
            if apart := unequal(optimizer, watched.tensors(), *keys) if watched.members else []:
                number = "" if apart == ["optimizer"] else ", or give `angle` a number"
                raise ValueError(
                    f"`unit='set'` must have one angle for all of {watched.name!r}, but its tensors have unequal "
                    f"{' and '.join(apart)}. Put them in one group of one optimizer{number}."
                )
            if self._angle == "lr" and not 0 <= float(group["lr"]) < math.pi:
                raise ValueError(_too_large(float(group["lr"]), group))
            lr = group.get("lr")
            if self._angle == "equilibrium" and isinstance(lr, Tensor) and lr.device.type != "cpu":
                raise ValueError(
                    f"`lr` must be a number for angle='equilibrium', got a tensor on {lr.device}, which would have to "
                    "be waited for in each step. Give the optimizer a number, or `angle` one."
                )
            self._of(watched, group, optimizer)

    def announce(self, stepping: Stepping) -> None:
        """Check, and say what the angles and decay mean for these weights. Reads the device."""
        self.check(stepping)
        if not stepping:
            return
        angles = [float(self._of(*one)) for one in stepping]
        now = " to ".join(dict.fromkeys(f"{angle:.3g}" for angle in (min(angles), max(angles))))
        source = {"lr": "the learning rate, in radians", "equilibrium": "that of the equilibrium of decay"}
        source["run"] = "that of the logged run"
        key = "run" if callable(self._angle) else str(self._angle)
        rank_zero_info(
            f"RotationControl turns {in_words([w for w, _, _ in stepping])} by an angle per step, "
            f"{source.get(key, 'constant')}: now {now}. Gradients and optimizer give the direction only."
        )
        said: dict[str, list[str]] = {}
        for watched, group, optimizer in stepping:
            if group.get("weight_decay"):
                said.setdefault(self._about_decay(watched, optimizer, group), []).append(watched.name)
        for words, names in said.items():
            say = rank_zero_info if "without effect" in words else rank_zero_warn
            say(f"Weight decay of {listed(names)}: {words}")

    def _about_decay(self, watched: Watched, optimizer: Optimizer, group: Group) -> str:
        if watched.members and unequal(optimizer, watched.tensors(), "lr", "weight_decay"):
            return "still turns the set under RotationControl, because that of its tensors is unequal. Make it equal."
        rule, name = update_rule(optimizer, group), type(optimizer).__name__
        if rule is None:
            return f"whether that of {name} still turns the weights under RotationControl is not known. Set it to 0."
        if rule.decay_is_radial(group):
            use = ", but for the angle that it sets" if self._angle == "equilibrium" else ""
            return f"without effect under RotationControl, because that of {name} only makes weights shorter{use}."
        return (
            f"still turns the weights under RotationControl, because {name} adds it to the gradient, and so to its "
            "momentum or second moment. Set it to 0 for them, or use decoupled decay."
        )


@lru_cache(maxsize=1024)
def _rotation(family: Any, lr: float, weight_decay: float, settings: tuple[tuple[str, Any], ...]) -> float:
    return equilibrium_rotation(family, lr=lr, weight_decay=weight_decay, **dict(settings))


def _too_large(lr: float, group: Group) -> str:
    name = f" of group {group['name']!r}" if "name" in group else ""
    return (
        f"`lr`{name} must be in [0, π) radians for angle='lr', got {lr:g}. A learning rate is an angle per step now: "
        "start from 0.01, or give `angle` a number."
    )
