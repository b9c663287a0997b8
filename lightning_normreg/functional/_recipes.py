"""Recipes with weight decay rewritten as recipes without it, that turn scale-invariant weights the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_normreg.functional._settings import FRACTION, NOT_NEGATIVE, POSITIVE, check

ConvertedFamily = Literal["sgd", "sgd_decoupled", "adam_decoupled", "nadam_decoupled", "lion", "muon"]

EXPONENTS = {"sgd": 2, "sgd_decoupled": 2, "adam_decoupled": 1, "nadam_decoupled": 1, "lion": 1, "muon": 1}
_REFUSED = {
    "nesterov": "its conversion is only approximate, off by a share of the decay: no Nesterov run without decay makes "
    "the same steps. Use momentum without Nesterov",
    "adam_l2": "its decay is divided by the second moment, and no run without it makes the same steps. Use AdamW",
    "rmsprop_l2": "its decay is divided by the second moment, and no run without it makes the same steps. Use AdamW",
}


@dataclass(frozen=True)
class Shrinkage:
    """A scalar that decay alone moves, under the optimizer of the weights: what decay does to every one of them."""

    scale: float = 1.0  # s, the weight under decay over the weight without it
    buffer: float | None = None  # momentum of the decay itself, where it is coupled; None before the first step

    def step(self, lr: float, decay: float, *, momentum: float = 0.0, dampening: float = 0.0) -> Shrinkage:
        """After one more step of coupled decay, as torch's SGD does it; without momentum, of decoupled decay too."""
        buffer = self._next_buffer(decay, momentum, dampening)
        scale = self.scale - lr * buffer
        if not scale > 0:
            raise ValueError(
                f"`weight_decay` must let the weight shrink without overshooting 0: lr·(1 − dampening)·weight_decay up "
                f"to (1 − √momentum)² does, got {lr * (1 - dampening) * decay:.3g} against "
                f"{(1 - math.sqrt(momentum)) ** 2:.3g}. Use a smaller `lr` or `weight_decay`."
            )
        return Shrinkage(scale, buffer)

    def _next_buffer(self, decay: float, momentum: float, dampening: float) -> float:
        gradient = decay * self.scale
        if self.buffer is None or not momentum:
            return gradient  # torch dampens neither the first step nor one without momentum
        return momentum * self.buffer + (1 - dampening) * gradient

    def rate_with_decay(self, lr: float, decay: float, momentum: float, dampening: float, exponent: int) -> float:
        """Learning rate under decay that makes the step that ``lr`` makes without."""
        plain = lr * self.scale**exponent
        return plain / (1 + plain * self._next_buffer(decay, momentum, dampening) / self.scale)


class Schedule(NamedTuple):
    """One setting per step, and how the weights of the two runs compare.

    Attributes:
        lrs: Learning rate of each step.
        momenta: Momentum of each step.
        scales: s before each step, and after the last: the weight under decay is s times the one without.
    """

    lrs: list[float]
    momenta: list[float]
    scales: list[float]


def without_decay(
    family: ConvertedFamily, lrs: Iterable[float], weight_decay: float, *, momentum: float = 0.0, dampening: float = 0.0
) -> Schedule:
    r"""Schedule without weight decay that turns a scale-invariant weight exactly as a schedule with decay does.

    With :math:`s_0=1` and :math:`v_t=w_t/s_t` from the same start, for any schedule :math:`\eta_t`:

    * ``"sgd"``, also with momentum, without Nesterov: :math:`\tilde\eta_t=\eta_t/(s_ts_{t+1})`, the same momentum and
      dampening. s is the same optimizer run on one number under decay alone; without momentum
      :math:`s_{t+1}=(1-\eta_t\lambda)s_t`.
    * ``"sgd_decoupled"``, decay of the weight itself: :math:`s_{t+1}=(1-\eta_t\lambda)s_t`, the same
      :math:`\tilde\eta_t`, and momentum :math:`\beta s_t/s_{t-1}`.
    * ``"adam_decoupled"`` (AdamW, AMSGrad), ``"nadam_decoupled"``, ``"lion"``, ``"muon"``: the same s,
      :math:`\tilde\eta_t=\eta_t/s_{t+1}`. Before each step first moments and momentum are to be multiplied by
      :math:`s_t/s_{t-1}`, second moments by its square, and eps is to be :math:`s_t` times as large; the learning rates
      alone leave an error. :class:`lightning_normreg.DecayFreeLR` does all of it.

    The weights without decay grow as 1/s, that is as :math:`e^{\eta\lambda t}`.

    Args:
        family: Which optimizer.
        lrs: Learning rate of each step of the recipe with decay, at least 0.
        weight_decay: λ, at least 0.
        momentum: β of SGD, in [0, 1).
        dampening: τ of SGD.

    Returns:
        Learning rates and momenta without decay, as many as ``lrs``, and one more scale s than that.

    Raises:
        ValueError: For Nesterov momentum, whose conversion is only approximate, and Adam or RMSprop with L2, which have
            none; where s reaches 0, under heavy ball where :math:`\eta(1-\tau)\lambda` exceeds
            :math:`(1-\sqrt\beta)^2`; and for arguments out of range.

    Examples:
        >>> recipe = without_decay("sgd", [0.1, 0.1, 0.1], 0.5)
        >>> [round(lr, 6) for lr in recipe.lrs], [round(s, 6) for s in recipe.scales]
        ([0.105263, 0.116635, 0.129236], [1.0, 0.95, 0.9025, 0.857375])

    Reference:
        Li and Arora 2020, https://arxiv.org/abs/1910.07454, theorem 2.7, for a constant learning rate; Hoffer et al.
        2018, https://arxiv.org/abs/1803.01814, section 3. Any schedule with momentum, and the adaptive ones: derived
        here.
    """
    exponent = _exponent(family, weight_decay, momentum)
    coupled = {"momentum": momentum, "dampening": dampening} if family == "sgd" else {}
    now, before = Shrinkage(), Shrinkage()
    recipe = Schedule([], [], [now.scale])
    for lr in lrs:
        check("lrs", lr, NOT_NEGATIVE)
        after = now.step(lr, weight_decay, **coupled)
        recipe.lrs.append(lr / (now.scale ** (exponent - 1) * after.scale))
        recipe.momenta.append(momentum if family == "sgd" else momentum * now.scale / before.scale)
        recipe.scales.append(after.scale)
        before, now = now, after
    return recipe


def with_decay(
    family: ConvertedFamily,
    lrs: Iterable[float],
    weight_decay: float,
    *,
    momentum: float | Sequence[float] = 0.0,
    dampening: float = 0.0,
) -> Schedule:
    r"""Schedule with weight decay that turns a scale-invariant weight exactly as a schedule without decay does.

    The inverse of :func:`without_decay`: with p = 2 for SGD and 1 for the others, and b the momentum of the decay,
    :math:`\eta_t=\tilde\eta_ts_t^p/(1+\tilde\eta_ts_t^{p-1}b_t)`, where :math:`b_t=\lambda s_t` if it has none. State
    and eps are divided where that multiplies them.

    Args:
        family: Which optimizer, see :func:`without_decay`.
        lrs: Learning rate of each step of the recipe without decay, at least 0.
        weight_decay: λ that the new recipe has, at least 0.
        momentum: β; for ``"sgd_decoupled"`` the one of each step, as :func:`without_decay` gives it, may be listed.
        dampening: τ of SGD.

    Returns:
        Learning rates and momenta with decay, as many as ``lrs``, and one more scale s than that.

    Raises:
        ValueError: For a family without exact conversion (Nesterov momentum, Adam or RMSprop with L2), where s reaches
            0, and for arguments out of range.

    Examples:
        >>> recipe = with_decay("sgd", [0.1, 0.1, 0.1], 0.5)
        >>> [round(lr, 6) for lr in recipe.lrs]
        [0.095238, 0.086768, 0.079696]

    Reference:
        Li and Arora 2020, https://arxiv.org/abs/1910.07454, and Hoffer et al. 2018, https://arxiv.org/abs/1803.01814;
        the rest is derived here.
    """
    lrs = list(lrs)
    momenta = [momentum] * len(lrs) if isinstance(momentum, int | float) else list(momentum)
    exponent = _exponent(family, weight_decay, *momenta)
    now, before = Shrinkage(), Shrinkage()
    recipe = Schedule([], [], [now.scale])
    for lr, beta in zip(lrs, momenta, strict=True):
        check("lrs", lr, NOT_NEGATIVE)
        decays, dampens = (beta, dampening) if family == "sgd" else (0.0, 0.0)
        rate = now.rate_with_decay(lr, weight_decay, decays, dampens, exponent)
        after = now.step(rate, weight_decay, momentum=decays, dampening=dampens)
        recipe.lrs.append(rate)
        recipe.momenta.append(beta if family == "sgd" else beta * before.scale / now.scale)
        recipe.scales.append(after.scale)
        before, now = now, after
    return recipe


def matched_lr(lr: float, weight_decay: float, *, norm: float, decayed_norm: float, exponent: int) -> float:
    r"""Learning rate that turns a weight without decay as decay turns its twin of another norm.

    .. math:: \tilde\eta_t=\frac{\eta_t}{1-\eta_t\lambda}\Big(\frac{\lVert v_t\rVert}{n_t}\Big)^p

    Exact, step by step, for SGD without momentum (p = 2), and for AdamW, Lion and Muon (p = 1) if their state and eps
    follow the ratio of the norms, see :func:`without_decay`. Two uses:

    * decay as projection: project v to a radius R after each step, ‖v‖ = R, and carry the norm along that the weight
      under decay would have, :math:`n_{t+1}=(1-\eta_t\lambda)q_tn_t` with :math:`q_t` the norm before the projection
      over R. State is multiplied by :math:`n_{t+1}/n_t` to the power of its degree, eps is eps·n/R.
      :class:`lightning_normreg.DecayFreeLR` does all of it.
    * norms recorded in a run with decay: :math:`n_t`, and the norm of the present run for ‖v‖.

    Args:
        lr: η of this step in the recipe with decay.
        weight_decay: λ of that recipe.
        norm: ‖v‖ before this step, in the run without decay.
        decayed_norm: n before this step, in the run with decay.
        exponent: p: 2 for SGD, 1 for AdamW, Lion and Muon.

    Returns:
        Learning rate without decay.

    Raises:
        ValueError: If a norm is not positive, ``exponent`` is neither 1 nor 2, or η·λ is 1 or more.

    Examples:
        >>> round(matched_lr(0.1, 0.5, norm=2.0, decayed_norm=1.0, exponent=2), 6)
        0.421053

    Reference:
        Hoffer et al. 2018, https://arxiv.org/abs/1803.01814, equation 8, to which 1/(1 − ηλ) is added here: with it the
        step is the same and not only close.
    """
    for name, value in {"norm": norm, "decayed_norm": decayed_norm, "lr": lr, "weight_decay": weight_decay}.items():
        check(name, value, POSITIVE if "norm" in name else NOT_NEGATIVE)
    if exponent not in (1, 2):
        raise ValueError(f"`exponent` must be 1 or 2, got {exponent}.")
    if not 0 <= lr * weight_decay < 1:
        raise ValueError(f"`lr` times `weight_decay` must be in [0, 1), got {lr * weight_decay:g}. Use a smaller `lr`.")
    return float(lr / (1 - lr * weight_decay) * (norm / decayed_norm) ** exponent)


def _exponent(family: str, weight_decay: float, *momenta: float) -> int:
    """Exponent p of a family that has an exact conversion, with the common arguments checked."""
    if family in _REFUSED:
        raise ValueError(f"`family` {family!r} has no exact conversion: {_REFUSED[family]}.")
    if family not in EXPONENTS:
        raise ValueError(f"`family` must be one of {', '.join(EXPONENTS)}, got {family!r}.")
    check("weight_decay", weight_decay, NOT_NEGATIVE)
    for momentum in momenta:
        check("momentum", momentum, FRACTION)
    return EXPONENTS[family]
