"""BatchNorm's running statistics follow a rescaled weight, so that evaluation computes the same function as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normreg._invariance._call import PrivateCall, check_callable

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Name of a BatchNorm → mean and variance per channel of what it normalizes."""


def keep_running_statistics(module: nn.Module, batch: Any, change: Callable[[], None]) -> None:
    r"""Change the weights of a module, and let the running statistics behind them follow.

    With m, v the statistics of one batch before the change and m′, v′ after it, the input of a BatchNorm has become
    :math:`a x + (m' - a m)` with :math:`a = \sqrt{v'/v}`, and so have the running ones:
    :math:`\mu \leftarrow a\mu + (m' - a m)`, :math:`\sigma^2 \leftarrow a^2\sigma^2`. Both are measured in float64 on a
    private copy. Statistics that have seen no batch yet are left as they are.

    Args:
        module: With a ``training_step``.
        batch: A batch for it.
        change: Changes the module's weights in place.

    Raises:
        ProbeError: If the module's loss cannot be computed on a private copy.
        ValueError: If it must not be tried: a manual ``training_step`` would step the real optimizers.
    """
    tracked = {name: m for name, m in module.named_modules() if _has_seen_batches(m)}
    if not tracked:
        change()
        return
    check_callable(module, batch, None)
    call = PrivateCall(module, None, batch, torch.float64)
    before = _batch_statistics(call, call.own_point())
    change()
    after = _batch_statistics(call, {name: p.detach().double() for name, p in module.named_parameters()})
    for name in tracked.keys() & before.keys() & after.keys():
        _follow(tracked[name], before[name], after[name])


def _has_seen_batches(module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or module.running_mean is None or not module.training:
        return False
    return module.num_batches_tracked is None or int(module.num_batches_tracked) > 0


def _batch_statistics(call: PrivateCall, point: Mapping[str, Tensor]) -> Statistics:
    found: Statistics = {}
    hooks = []
    for name, module in call.module.named_modules():
        if isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(_Recorder(name, found)))
    try:
        call.run(point, lambda loss: None, seed=0)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Recorder:
    def __init__(self, name: str, found: Statistics) -> None:
        self._name, self._found = name, found

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].detach().transpose(0, 1).flatten(1)
        self._found.setdefault(self._name, (values.mean(dim=1), values.var(dim=1, correction=0)))


@torch.no_grad()
def _follow(norm: nn.Module, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    (mean, variance), (new_mean, new_variance) = before, after
    # A channel without variance has no scale to follow; one behind unchanged weights keeps its bits.
    usable = (variance > 0) & (new_variance > 0) & ((mean != new_mean) | (variance != new_variance))
    squared = torch.where(usable, new_variance / torch.where(variance > 0, variance, 1.0), 1.0)
    shift = torch.where(usable, new_mean - squared.sqrt() * mean, 0.0)
    norm.running_mean.copy_(squared.sqrt() * norm.running_mean + shift)
    norm.running_var.copy_(squared * norm.running_var)
