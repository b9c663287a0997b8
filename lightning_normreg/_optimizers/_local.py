"""How the length of one step really depended on the weight's norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._optimizers._lookup import acting, group_of, update_rule
from lightning_normreg._optimizers._rule import Group, Local
from lightning_normreg._weights import is_sharded, local
from lightning_normreg.functional._device import accumulator

State = dict[str, Any]


@torch.no_grad()
def scale_exponent(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Exponent p̂ = 1 − d log‖Δ‖ / d log‖w‖ of the step that an optimizer has just taken.

    The derivative is taken with gradients, present and past, that are proportional to 1/‖w‖, and with the lengths of
    past steps as they were. It differs from the rule's integer p where an absolute constant counts: with Adam's eps it
    is p̂ = 1 + ⟨eps / (√v̂ + eps)⟩, weighted by the squared update, so 2 where eps outweighs the gradients.

    To be called after the step, before gradients are cleared. The 0-dimensional tensor is on the parameter's device and
    not waited for. It is None where the exponent is not known: without a rule, without state, where processes have
    parts of it only, and for optimizers whose constants are too entangled.
    """
    group, state = group_of(optimizer, parameter), optimizer.state.get(parameter, {})
    rule = None if group is None else update_rule(optimizer, group)
    if group is None or rule is None or rule.local == "unknown":
        return None
    if rule.local == "exact":
        return _real(local(parameter)).new_full((), float(rule.exponent))
    if not state or acting(optimizer) is not optimizer or is_sharded(parameter):
        return None  # each process has the state of its own share only
    if rule.local in ("nadam", "rmsprop", "adagrad", "adadelta") and parameter.grad is None:
        return None
    return _FORMULAS[rule.local](group, state, parameter)


def _adam(group: Group, state: State, parameter: Tensor) -> Tensor:
    return _with_share(group["eps"], _corrected_root(group, state), _real(state["exp_avg"]))


def _radam(group: Group, state: State, parameter: Tensor) -> Tensor:
    # The bias of its root is corrected after eps was added, and only once ρ_t > 5.
    beta, step = float(group["betas"][1]), _step(state, parameter)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / (1 - beta**step)
    adapted = _with_share(group["eps"], _real(state["exp_avg_sq"]).sqrt(), _real(state["exp_avg"]))
    return torch.where(length > 5, adapted, torch.full_like(adapted, 2.0))


def _nadam(group: Group, state: State, parameter: Tensor) -> Tensor:
    beta, step, product = float(group["betas"][0]), _step(state, parameter), state["mu_product"].to(parameter.device)
    now, then = (beta * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"])) for s in (step, step + 1))
    momentum = then / (1 - product * then) * state["exp_avg"]
    return _with_share(
        group["eps"],
        _corrected_root(group, state),
        _real((1 - now) / (1 - product) * _gradient(group, parameter) + momentum),
    )


def _rmsprop(group: Group, state: State, parameter: Tensor) -> Tensor:
    variance = _real(state["square_avg"])
    if group["centered"]:
        variance = variance - _real(state["grad_avg"]) ** 2
    root = variance.sqrt()
    if group["momentum"] > 0:  # of steps: the roots of the past count as if they were today's
        return _with_share(group["eps"], root, _real(state["momentum_buffer"]) * (root + group["eps"]))
    return _with_share(group["eps"], root, _real(_gradient(group, parameter)))


def _adagrad(group: Group, state: State, parameter: Tensor) -> Tensor | None:
    gradient = _gradient(group, parameter)
    if gradient.is_sparse or group["initial_accumulator_value"]:
        return None
    return _with_share(group["eps"], _real(state["sum"]).sqrt(), _real(gradient))


def _adadelta(group: Group, state: State, parameter: Tensor) -> Tensor:
    eps, rho = group["eps"], group["rho"]
    scale = _real(state["square_avg"]) + eps
    ratio = _real(_gradient(group, parameter)) ** 2 / scale
    # acc = ρ acc' + (1 − ρ) Δ² with Δ² = (acc' + eps) g² / (v + eps) gives the average acc' from before the step.
    before = (_real(state["acc_delta"]) - (1 - rho) * eps * ratio) / (rho + (1 - rho) * ratio)
    return _one_and_mean(eps / scale, (before + eps) * ratio)


def _adafactor(group: Group, state: State, parameter: Tensor) -> Tensor:
    weight = _real(parameter)
    below: Tensor = weight.square().mean().sqrt() < group["eps"][1]
    return below.to(weight.dtype)


def _with_share(eps: float, root: Tensor, numerator: Tensor) -> Tensor:
    return _one_and_mean(eps / (root + eps), (numerator / (root + eps)) ** 2)


def _one_and_mean(share: Tensor, weight: Tensor) -> Tensor:
    total = weight.sum()
    mean: Tensor = torch.where(total > 0, (share * weight).sum() / total, 0.0)
    return 1 + mean


def _corrected_root(group: Group, state: State) -> Tensor:
    second = _real(state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"])
    correction: Tensor = 1 - float(group["betas"][1]) ** _step(state, second)
    return (second / correction).sqrt()


def _step(state: State, like: Tensor) -> Tensor:
    # Usually a number in the host's memory, which is copied over without waiting.
    return torch.as_tensor(state["step"], dtype=accumulator(like.dtype)).to(like.device)


def _gradient(group: Group, parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    gradient = -parameter.grad if group.get("maximize") else parameter.grad
    decay = group.get("weight_decay", 0)
    return gradient if group.get("decoupled_weight_decay") or not decay else gradient + decay * parameter


def _real(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.to(accumulator(real.dtype))


_FORMULAS: dict[Local, Callable[[Group, State, Tensor], Tensor | None]] = {
    "adam": _adam,
    "radam": _radam,
    "nadam": _nadam,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "adafactor": _adafactor,
}
