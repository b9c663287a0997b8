"""Running statistics follow a rescaled weight, and what its outputs change by all the same is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_normreg._symmetries import OwnStep, PrivateCall, ProbeError, check_callable

Pair = tuple[Tensor, Tensor]
"""Mean and variance per channel, as one batch has them."""


class Moved(NamedTuple):
    """Largest change of an output, in root mean squares of all that the same module puts out."""

    training: float
    evaluation: float


class _Statistics(NamedTuple):
    exact: dict[str, Pair]  # name of a BatchNorm → of what it normalizes
    averaged: dict[tuple[str, str], Pair]  # names of two buffers → what a step moves them towards


def change_and_follow(
    module: nn.Module,
    batches: list[Any],
    change: Callable[[], None],
    share: Callable[[Any], Any],
    step: OwnStep,
    *,
    twins: Sequence[str] = (),
) -> Moved:
    r"""Change the weights of a module, let running statistics follow, and measure what its outputs change by.

    With m, v the statistics of one batch before the change and m′, v′ after it, the input of a normalization has become
    :math:`a x + (m' - a m)` with :math:`a = \sqrt{v'/v}`, and so have the running ones:
    :math:`\mu \leftarrow a\mu + (m' - a m)`, :math:`\sigma^2 \leftarrow a^2\sigma^2`. That is done for BatchNorm, and
    for whatever keeps a running mean and variance as buffers, by what a step moves them towards. The eps of a BatchNorm
    is now another share of the variance, which its gain makes good:
    :math:`\gamma \leftarrow \gamma\sqrt{(v' + \epsilon)/(v + \epsilon)}/a`.
    All of it is measured on a private copy, in float32 at least.

    Args:
        module: With a ``training_step``.
        batches: Batches for it, of which the first counts that it can be called with.
        change: Changes the module's weights in place.
        share: From what this process measured to what all processes use.
        step: How the module is called.
        twins: Names of parts whose BatchNorms follow in evaluation mode too, as those of a teacher do.

    Returns:
        The largest change of what the last of the outermost modules puts out, in training and in evaluation mode.

    Raises:
        ProbeError: If the module's loss cannot be computed on a private copy.
        ValueError: If the module is not in training mode, or has no ``training_step``.
    """
    check_callable(module, batches[0], step)
    call, statistics = _callable_with(module, batches, step, twins)
    outputs = _outputs(call, module)
    change()
    before, after = share(statistics), share(_statistics(call, module, twins))
    norms = {
        name: m
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm) and (m.training or _is_part(name, twins))
    }
    for name in norms.keys() & before.exact.keys() & after.exact.keys():
        _follow_in(norms[name], before.exact[name], after.exact[name])
    buffers = dict(module.named_buffers())
    for names in before.averaged.keys() & after.averaged.keys():
        mean, variance = (buffers[name] for name in names)
        _follow(mean, variance, _scale(before.averaged[names], after.averaged[names]))
    pairs = zip(outputs, _outputs(call, module), strict=True)
    return share(Moved(*(_apart(old, new) for old, new in pairs)))  # type: ignore[no-any-return]


def keeps_running_statistics(module: nn.Module) -> bool:
    """Whether a part of a module has a running mean and variance."""
    return any(map(_keeps, module.modules()))


def _keeps(part: nn.Module) -> bool:
    return bool(_named(part, "mean") and _named(part, "var"))


def _is_part(name: str, parts: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _named(part: nn.Module, what: str) -> list[str]:
    return [key for key, _ in part.named_buffers(recurse=False) if what in key]


def _callable_with(
    module: nn.Module, batches: list[Any], step: OwnStep, twins: Sequence[str]
) -> tuple[PrivateCall, _Statistics]:
    wide = any(p.dtype == torch.float64 for p in module.parameters())
    for batch in batches:
        call = PrivateCall(module, step, batch, torch.float64 if wide else torch.float32)
        try:
            return call, _statistics(call, module, twins)
        except ProbeError:
            if batch is batches[-1]:
                raise
    raise AssertionError("no batch")


def _run(call: PrivateCall, module: nn.Module) -> dict[str, Tensor]:
    """Call it at the module's weights; what that leaves in its buffers."""
    distinct = {name: module.get_parameter(name) for name, _ in call.module.named_parameters()}
    point = {name: p.detach().to(call.dtype).requires_grad_(p.requires_grad) for name, p in distinct.items()}
    call.run(point, lambda loss: None, seed=0)
    return call.left


def _statistics(call: PrivateCall, module: nn.Module, twins: Sequence[str]) -> _Statistics:
    exact: dict[str, Pair] = {}
    parts = dict(call.module.named_modules())
    norms = {name: part for name, part in parts.items() if isinstance(part, _BatchNorm)}
    hooks = [part.register_forward_pre_hook(_recorder(name, exact)) for name, part in norms.items()]
    # By statistics that have not followed yet, what comes behind them would be off.
    modes = {part: part.training for name, part in parts.items() if _keeps(part) and _is_part(name, twins)}
    hooks += [part.register_forward_pre_hook(_train) for part in modes]
    try:
        left = _run(call, module)
        return _Statistics(exact, _averages(call, module, left))
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode


def _train(part: nn.Module, args: Any) -> None:
    part.training = True


def _outputs(call: PrivateCall, module: nn.Module) -> list[list[Tensor]]:
    """What the last of the outermost modules puts out, in training and in evaluation mode."""
    modes = {m: m.training for m in call.module.modules()}
    found = []
    try:
        for is_evaluation in (False, True):
            if is_evaluation:
                call.module.eval()
            with _listening(call.module) as outputs:
                _run(call, module)
            found.append(outputs)
    finally:
        for m, mode in modes.items():
            m.training = mode
    return found


def _averages(call: PrivateCall, module: nn.Module, left: dict[str, Tensor]) -> dict[tuple[str, str], Pair]:
    """What a step moves the running mean and variance of other modules than BatchNorm towards.

    A buffer b that becomes αb + (1 − α)s tells α when it starts from b + 1, and so s. What is moved in other ways, such
    as the vectors of spectral normalization, has no such α.
    """
    starts = {name: b.detach().to(call.dtype) for name, b in call.module.named_buffers() if b.is_floating_point()}
    pairs = []
    for name, part in call.module.named_modules():
        keys = [[f"{name}.{key}".lstrip(".") for key in _named(part, what)] for what in ("mean", "var")]
        moved = [[key for key in each if key in starts and not torch.equal(left[key], starts[key])] for each in keys]
        if not isinstance(part, _BatchNorm) and all(len(each) == 1 for each in moved):
            pairs.append((moved[0][0], moved[1][0]))
    if not pairs:
        return {}
    call.buffers = {name: starts[name] + 1 for pair in pairs for name in pair}
    try:
        shifted = _run(call, module)
    finally:
        call.buffers = {}
    found = {}
    for pair in pairs:
        means, variances = (_moved_towards(starts[name], left[name], shifted[name]) for name in pair)
        if means is not None and variances is not None:
            found[pair] = means, variances
    return found


def _moved_towards(start: Tensor, left: Tensor, shifted: Tensor) -> Tensor | None:
    memory = (shifted - left).double()
    # All entries have one memory, but for roundoff of the two calls.
    tolerance = 1e-6 if start.dtype == torch.float64 else 1e-3
    if float(memory.max() - memory.min()) >= tolerance or not 0 <= float(memory.mean()) < 1 - 1e-3:
        return None
    return ((left.double() - memory.mean() * start.double()) / (1 - memory.mean())).cpu()


def _recorder(name: str, found: dict[str, Pair]) -> Callable[..., None]:
    def record(part: nn.Module, args: tuple[Tensor, ...]) -> None:  # a function, because it survives deepcopy as it is
        values = args[0].detach().transpose(0, 1).flatten(1).cpu().double()  # not every device has float64
        found.setdefault(name, (values.mean(dim=1), values.var(dim=1, correction=0)))

    return record


@contextmanager
def _listening(module: nn.Module) -> Iterator[list[Tensor]]:
    """Meanwhile the last output of an outermost module is kept.

    A step may call its layers one by one; what is in front of a normalization changes with the weights, and may.
    """
    outputs: list[Tensor] = []
    depth = [0]

    def enter(part: nn.Module, args: Any) -> None:
        depth[0] += 1

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        depth[0] -= 1
        found = [t.detach().clone() for t in tree_leaves(output) if not depth[0] and _is_real(t)]
        outputs[:] = found or outputs

    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]  # which take no hooks
    hooks: list[Any] = [part.register_forward_pre_hook(enter) for part in parts]
    hooks += [part.register_forward_hook(leave) for part in parts]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1


def _apart(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest difference, in root mean squares of each tensor; NaN where they cannot be compared."""
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return math.nan
    pairs = [(a.cpu().double(), b.cpu().double()) for a, b in zip(before, after, strict=True)]
    sizes = [float(a.square().mean().sqrt()) for a, _ in pairs]
    return max(
        (float((b - a).abs().max()) / size for (a, b), size in zip(pairs, sizes, strict=True) if size), default=0.0
    )


def _scale(before: Pair, after: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Where there is something to follow, by which square a variance is multiplied, and what is added to a mean."""
    (mean, variance), (new_mean, new_variance) = before, after
    # A channel without variance has no scale to follow; one behind unchanged weights keeps its bits.
    usable = (variance > 0) & (new_variance > 0) & ((mean != new_mean) | (variance != new_variance))
    squared = torch.where(usable, new_variance / torch.where(variance > 0, variance, 1.0), 1.0)
    return usable, squared, torch.where(usable, new_mean - squared.sqrt() * mean, 0.0)


def _follow(mean: Tensor, variance: Tensor, scale: tuple[Tensor, Tensor, Tensor]) -> None:
    _, squared, shift = scale
    _affine_(mean, squared.sqrt(), shift)
    _affine_(variance, squared, torch.zeros_like(shift))


def _follow_in(norm: _BatchNorm, before: Pair, after: Pair) -> None:
    usable, squared, shift = scale = _scale(before, after)
    if norm.running_mean is not None and norm.running_var is not None:
        _follow(norm.running_mean, norm.running_var, scale)
    if norm.affine:
        (_, variance), (_, new_variance) = before, after
        eps_share = ((new_variance + norm.eps) / ((variance + norm.eps) * squared)).sqrt()
        _affine_(norm.weight, torch.where(usable, eps_share, 1.0), torch.zeros_like(shift))


@torch.no_grad()
def _affine_(tensor: Tensor, factor: Tensor, shift: Tensor) -> None:
    tensor.copy_(tensor.cpu().double() * factor + shift)
