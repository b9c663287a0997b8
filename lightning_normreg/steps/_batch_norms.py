"""BatchNorm follows a rescaled weight, so that the network computes the same function as before in both modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normreg._symmetries import OwnStep, PrivateCall, ProbeError, check_callable

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Name of a BatchNorm → mean and variance per channel of what it normalizes."""


def keep_batch_norms(
    module: nn.Module,
    batches: list[Any],
    change: Callable[[], None],
    share: Callable[[Statistics], Statistics],
    step: OwnStep,
) -> None:
    r"""Change the weights of a module, and let the BatchNorms behind them follow.

    With m, v the statistics of one batch before the change and m′, v′ after it, the input of a BatchNorm has become
    :math:`a x + (m' - a m)` with :math:`a = \sqrt{v'/v}`, and so have the running ones:
    :math:`\mu \leftarrow a\mu + (m' - a m)`, :math:`\sigma^2 \leftarrow a^2\sigma^2`. Its eps is now another share of
    the variance, which the gain makes good: :math:`\gamma \leftarrow \gamma\sqrt{(v' + \epsilon)/(v + \epsilon)}/a`.
    All of it is measured on a private copy, in float32 at least.

    Args:
        module: With a ``training_step``.
        batches: Batches for it, of which the first counts that it can be called with.
        change: Changes the module's weights in place.
        share: From what this process measured to what all processes use.
        step: How the module is called.

    Raises:
        ProbeError: If the module's loss cannot be computed on a private copy.
        ValueError: If the module is not in training mode, or has no ``training_step``.
    """
    norms = {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm) and m.training}
    if not norms:
        change()
        return
    check_callable(module, batches[0], step)
    call, before = _callable_with(module, batches, step)
    change()
    after = _batch_statistics(call, module)
    before, after = share(before), share(after)
    for name in norms.keys() & before.keys() & after.keys():
        _move(norms[name], before[name], after[name])


def _callable_with(module: nn.Module, batches: list[Any], step: OwnStep) -> tuple[PrivateCall, Statistics]:
    wide = any(p.dtype == torch.float64 for p in module.parameters())
    for batch in batches:
        call = PrivateCall(module, step, batch, torch.float64 if wide else torch.float32)
        try:
            return call, _batch_statistics(call, module)
        except ProbeError:
            if batch is batches[-1]:
                raise
    raise AssertionError("no batch")


def _batch_statistics(call: PrivateCall, module: nn.Module) -> Statistics:
    found: Statistics = {}
    distinct = {name: module.get_parameter(name) for name, _ in call.module.named_parameters()}
    point = {name: p.detach().to(call.dtype).requires_grad_(p.requires_grad) for name, p in distinct.items()}
    hooks = []
    for name, part in call.module.named_modules():
        if isinstance(part, _BatchNorm):
            hooks.append(part.register_forward_pre_hook(_recorder(name, found)))
    try:
        call.run(point, lambda loss: None, seed=0)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _recorder(name: str, found: Statistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(
        module: nn.Module, args: tuple[Tensor, ...]
    ) -> None:  # a function, because it survives deepcopy as it is
        values = args[0].detach().transpose(0, 1).flatten(1).cpu().double()  # not every device has float64
        found.setdefault(name, (values.mean(dim=1), values.var(dim=1, correction=0)))

    return record


@torch.no_grad()
def _move(norm: _BatchNorm, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
    (mean, variance), (new_mean, new_variance) = before, after
    # A channel without variance has no scale to follow; one behind unchanged weights keeps its bits.
    usable = (variance > 0) & (new_variance > 0) & ((mean != new_mean) | (variance != new_variance))
    squared = torch.where(usable, new_variance / torch.where(variance > 0, variance, 1.0), 1.0)
    shift = torch.where(usable, new_mean - squared.sqrt() * mean, 0.0)
    if norm.running_mean is not None and norm.running_var is not None:
        _affine_(norm.running_mean, squared.sqrt(), shift)
        _affine_(norm.running_var, squared, torch.zeros_like(shift))
    if norm.affine:
        eps_share = ((new_variance + norm.eps) / ((variance + norm.eps) * squared)).sqrt()
        _affine_(norm.weight, torch.where(usable, eps_share, 1.0), torch.zeros_like(shift))


def _affine_(tensor: Tensor, factor: Tensor, shift: Tensor) -> None:
    tensor.copy_(tensor.cpu().double() * factor + shift)
