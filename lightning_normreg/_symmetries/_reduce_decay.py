"""What weight decay does to the function that a network computes: what is left of it modulo symmetries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normreg._symmetries._symmetry import Symmetries, whole_name
from lightning_normreg._weights import listed

_COST = {"gamma": 0.01, "beta": 0.1, "bias": 0.1}
"""What decay is to be left on: gains rather than shifts and biases, and these rather than matrices."""
_ZERO = 1e-9


@dataclass(frozen=True)
class ReducedDecay:
    """A recipe that trains the same function with as little decay as possible.

    Attributes:
        rates: Name → what decay takes off the tensor in a step; negative where the tensor grows by that share.
        growth: Name → g: after t steps the tensor is :math:`e^{gt}` times that of the given recipe.
        labels: Name → what its own decay does: ``"schedule"``: nothing is left of it but a learning-rate schedule;
            ``"acts through …"``: it is decay of these; ``"acts itself"``; ``"not decayed"``.
        removable: Decayed tensors whose penalty is removable in the limit: a symmetry shrinks them and lets no other
            decayed tensor grow, so that it can be made as small as one likes without a change of the function, mostly
            as gains that are not decayed grow. That is about the penalty, not about training, which is finite.
    """

    rates: Mapping[str, float]
    growth: Mapping[str, float]
    labels: Mapping[str, str]
    removable: frozenset[str]

    def lr_factors(self, step: int, exponent: int) -> dict[str, float]:
        r"""By what the learning rates of the given recipe are multiplied in a step of this one.

        :math:`e^{g(t+1)}` where an update does not depend on the size of the gradient, and :math:`e^{g(2t+1)}` where
        it is proportional to it, as gradients are :math:`e^{-gt}` times the given ones. What the optimizer remembers of
        gradients has to follow, by :math:`e^{-g}` after each step.

        Args:
            step: t, counted from 0.
            exponent: 1 for AdamW, Lion and Muon, 2 for SGD.

        Raises:
            ValueError: For another exponent.
        """
        if exponent not in (1, 2):
            raise ValueError(f"`exponent` must be 1 or 2, got {exponent}.")
        times = step + 1 if exponent == 1 else 2 * step + 1
        return {name: math.exp(growth * times) for name, growth in self.growth.items()}


def reduce_decay(symmetries: Symmetries, rates: Mapping[str, float]) -> ReducedDecay:
    r"""Find an equivalent recipe with as little decay as possible, on gains where it can be.

    Decay takes a share :math:`r_i=\eta_i\lambda_i` off tensor i in each step. For a symmetry c the run with
    :math:`1-r'_i=(1-r_i)s^{c_i}` computes the same function at every step, if its learning rates follow
    (:meth:`ReducedDecay.lr_factors`): w and :math:`a^c w` are the same function, and a may go on in time. So what
    counts is :math:`\rho_i=-\log(1-r_i)` modulo the symmetries, and by linear programming

    .. math:: \min_y\sum_i p_i\,|\rho_i-\sum_k y_k c_{ki}|

    with p = 0.01 for gains, 0.1 for shifts and biases, and 1 for the rest. This cost is least, not the number of
    tensors: gain and shift are two in place of one matrix that reads them. Exact for negligible eps, constant rates,
    and decay that is decoupled, or SGD's without momentum.

    Args:
        symmetries: From :func:`find_symmetries`.
        rates: Clean name → learning rate times decay, in [0, 1); a part of a fused tensor has that of the whole. What
            is not named is not decayed.

    Returns:
        The recipe, by the names in ``symmetries.tensors``. The decay of a gain of the form 1 + γ is not one of 1 + γ:
        it stays where it is.

    Raises:
        ValueError: If a rate is out of its range, or a name is none of the tensors, nor inert.

    Examples:
        >>> from torch import nn
        >>> from lightning_normreg import find_symmetries
        >>> model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 2))
        >>> found = find_symmetries(model, torch.randn(8, 4), forward=lambda m, x: m(x).exp().mean())
        >>> for name, label in reduce_decay(found, {"0.weight": 1e-4, "2.weight": 1e-4}).labels.items():
        ...     print(name, label)
        0.weight schedule
        1.weight not decayed
        1.bias not decayed
        2.weight acts through 1.weight, 1.bias
        2.bias not decayed

    Reference:
        Derived here; van Laarhoven 2017, https://arxiv.org/abs/1706.05350, has the case of single weights, and its
        closing remark, that only the last gain is regularized.
    """
    names = symmetries.tensors
    known = {whole_name(name) for name in (*names, *symmetries.inert)}
    for name, rate in rates.items():
        if name not in known:
            raise ValueError(
                f"`rates` must name tensors that were asked, got {name!r}. There are {listed([*known], 6)}."
            )
        if not 0 <= rate < 1:
            raise ValueError(f"`rates` must be learning rate times decay, in [0, 1), got {rate} for {name!r}.")
    given = torch.tensor([-math.log1p(-rates.get(whole_name(name), 0.0)) for name in names], dtype=torch.float64)
    fixed = torch.tensor([name.startswith("1 + ") for name in names])
    cost = [1e3 if one else _COST.get(symmetries.roles[n], 1.0) for n, one in zip(names, fixed.tolist(), strict=True)]
    exponents, free = symmetries.matrix(), given.masked_fill(fixed, 0.0)
    moved = _moved(exponents, free, cost)
    n, d = exponents.shape
    scale = float(free.max()) if n else 0.0
    left = free - exponents @ moved
    left = torch.where(left.abs() < _ZERO * scale, 0.0, left)
    growth = free - left
    rest = torch.where(fixed, given, left)
    labels = {}
    for i, name in enumerate(names):
        used = [k for k in range(d) if abs(float(moved[k])) > _ZERO * scale and exponents[i, k] != 0]
        others = [j for j in range(n) if j != i and any(exponents[j, k] != 0 for k in used) and left[j] != 0]
        through = f"acts through {listed([names[j] for j in others], 4)}" if others else "schedule"
        labels[name] = "not decayed" if given[i] == 0 else "acts itself" if rest[i] != 0 else through
    taken = dict(zip(names, (-torch.expm1(-rest)).tolist(), strict=True))
    removable = _removable(exponents, given > 0, fixed)
    return ReducedDecay(
        rates=taken,
        growth=dict(zip(names, growth.tolist(), strict=True)),
        labels=labels,
        removable=frozenset(name for name, is_so in zip(names, removable, strict=True) if is_so),
    )


def _moved(exponents: Tensor, free: Tensor, cost: list[float]) -> Tensor:
    """How much of each symmetry is taken off, so that the rest costs least."""
    from scipy.optimize import linprog  # noqa: PLC0415  it takes half a second to import

    n, d = exponents.shape
    scale = float(free.max()) if n else 0.0
    if not d or scale == 0:
        return torch.zeros(d, dtype=torch.float64)
    identity = torch.eye(n, dtype=torch.float64)
    solved = linprog(
        [0.0] * d + cost * 2,
        A_eq=torch.cat([exponents, identity, -identity], dim=1).numpy(),
        b_eq=(free / scale).numpy(),
        bounds=[(None, None)] * d + [(0, None)] * (2 * n),
        method="highs",
    )
    return torch.from_numpy(solved.x[:d]) * scale


def _removable(exponents: Tensor, decayed: Tensor, fixed: Tensor) -> list[bool]:
    """Whether a symmetry shrinks each, and lets no decayed one grow. Such symmetries add up, so one program finds all.

    Decay draws a gain of the form 1 + γ to 1, so its penalty need not fall as 1 + γ does: where decayed, it stays.
    """
    from scipy.optimize import linprog  # noqa: PLC0415  it takes half a second to import

    n, d = exponents.shape
    own = decayed & ~fixed
    if not d or not own.any():
        return [False] * n
    # At most 1 of each counts, and no more than its exponent, which is at least 0.
    solved = linprog(
        [0.0] * d + [-1.0] * n,
        A_ub=torch.cat([-exponents, torch.eye(n, dtype=torch.float64)], dim=1)[own].numpy(),
        b_ub=[0.0] * int(own.sum()),
        A_eq=torch.nn.functional.pad(exponents[decayed & fixed], (0, n)).numpy(),
        b_eq=[0.0] * int((decayed & fixed).sum()),
        bounds=[(None, None)] * d + [(0, 1 if one else 0) for one in own.tolist()],
        method="highs",
    )
    return [bool(share > 0.5) for share in solved.x[d:]]
