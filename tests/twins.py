"""Optimizers of other packages, written from their papers' equations, in the precision of the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Twin(Optimizer):
    """One update per parameter, from its gradient and a state of its own."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter."""
        for group in self.param_groups:
            for w in group["params"]:
                self.update(w, w.grad, self.state[w], group)

    def update(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """The optimizer's own equation."""
        raise NotImplementedError


class Lion(_Twin):
    """Chen et al. 2023, https://arxiv.org/abs/2302.06675, program 1."""

    def update(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Set w ← (1 − ηλ)w − η·sign(β₁m + (1 − β₁)g), m ← β₂m + (1 − β₂)g."""
        beta1, beta2 = group.get("betas", (0.9, 0.99))
        m = state.setdefault("exp_avg", torch.zeros_like(w))
        w.mul_(1 - group["lr"] * group["weight_decay"])
        w.sub_(group["lr"] * (beta1 * m + (1 - beta1) * g).sign())
        m.mul_(beta2).add_(g, alpha=1 - beta2)


class OneSize(_Twin):
    """AdamW whose second moment is one number for all of a group: what it steps by is as perpendicular as gradients."""

    def step(self, closure: Any = None) -> None:
        """Average the squares of all entries first."""
        for group in self.param_groups:
            entries = torch.cat([w.grad.flatten() for w in group["params"]])
            t = group["step"] = group.get("step", 0) + 1
            group["v"] = 0.95 * group.get("v", 0.0) + 0.05 * float(entries.square().mean())
            group["size"] = math.sqrt(group["v"] / (1 - 0.95**t))
        super().step()

    def update(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Set w ← (1 − ηλ)w − η·m̂/√v̂."""
        m = state.setdefault("exp_avg", torch.zeros_like(w))
        m.mul_(0.9).add_(g, alpha=0.1)
        w.mul_(1 - group["lr"] * group["weight_decay"])
        w.sub_(group["lr"] / (1 - 0.9 ** group["step"]) / group["size"] * m)


class Muon(_Twin):
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, orthogonalized exactly; a filter is a row."""

    def update(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Set m ← 0.95 m + g, w ← (1 − ηλ)w − ηUVᵀ, with USVᵀ = g + 0.95 m."""
        m = state.setdefault("momentum", torch.zeros_like(w))
        m.mul_(0.95).add_(g)
        u, _, v = torch.linalg.svd((g + 0.95 * m).flatten(1), full_matrices=False)
        w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * (u @ v).view_as(w))


class Adam(_Twin):
    """Moments of Kingma and Ba 2015, algorithm 1, for the three below."""

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Bias-corrected m̂/√v̂."""
        beta1, beta2 = group.get("betas", (0.9, 0.999))
        m, v = (state.setdefault(name, torch.zeros_like(g)) for name in ("exp_avg", "exp_avg_sq"))
        t = state["step"] = state.get("step", 0) + 1
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return m / (1 - beta1**t) / (v / (1 - beta2**t)).sqrt()


class AdamP(Adam):
    """Heo et al. 2021, https://arxiv.org/abs/2006.08217, algorithm 2, for rows that it finds scale-invariant."""

    def update(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Without the part of the update along the row, and with wd_ratio times the decay."""
        update = across(self.direction(g, state, group), w)
        w.mul_(1 - group["lr"] * group["weight_decay"] * 0.1).sub_(group["lr"] * update)


class LAMB(Adam):
    """You et al. 2020, https://arxiv.org/abs/1904.00962, algorithm 2 with φ(z) = z, row by row."""

    def update(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Set w ← w − η‖w‖·r/‖r‖, r = m̂/√v̂ + λw."""
        r = self.direction(g, state, group) + group["weight_decay"] * w
        w.sub_(group["lr"] * rows(w) / rows(r) * r)


class SGDP(_Twin):
    """The same paper, algorithm 1, as its authors' code does it: the momentum loses what the update loses."""

    def update(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Set b ← P(βb + g), w ← (1 − ηλr/(1 − β))w − ηb."""
        beta = group["momentum"]
        b = state["momentum"] = across(beta * state.get("momentum", torch.zeros_like(w)) + g, w)
        w.mul_(1 - group["lr"] * group["weight_decay"] * 0.1 / (1 - beta)).sub_(group["lr"] * b)


def rows(x: Tensor) -> Tensor:
    """Norm of every row, as a column."""
    return x.norm(dim=1, keepdim=True)


def across(x: Tensor, w: Tensor) -> Tensor:
    """Rows of x without their part along those of w."""
    return x - w * (x * w).sum(dim=1, keepdim=True) / rows(w) ** 2
