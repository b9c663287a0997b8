"""Running statistics follow a rescaled weight, and what its outputs change by all the same is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_normreg._symmetries import OwnStep, PrivateCall, ProbeError, check_callable

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Name of a normalization → mean and variance per channel, as one batch has them."""


class Moved(NamedTuple):
    """Largest change of an output, in root mean squares of all that the same module puts out."""

    training: float
    evaluation: float


class _Look(NamedTuple):
    exact: Statistics  # of what BatchNorms normalize
    averaged: Statistics  # what the running averages of other normalizations are moved towards
    training: list[Tensor]
    evaluation: list[Tensor]


def change_and_follow(
    module: nn.Module,
    batches: list[Any],
    change: Callable[[], None],
    share: Callable[[Any], Any],
    step: OwnStep,
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

    Returns:
        The largest change of what the last of the outermost modules puts out, in training and in evaluation mode.

    Raises:
        ProbeError: If the module's loss cannot be computed on a private copy.
        ValueError: If the module is not in training mode, or has no ``training_step``.
    """
    check_callable(module, batches[0], step)
    call, before = _callable_with(module, batches, step)
    change()
    after = _look(call, module)
    norms = {name: m for name, m in module.named_modules() if m.training}
    for exact in (True, False):
        old, new = (share(look.exact if exact else look.averaged) for look in (before, after))
        for name in norms.keys() & old.keys() & new.keys():
            _move(norms[name], old[name], new[name])
    last = _look(call, module)
    return share(Moved(_apart(before.training, last.training), _apart(before.evaluation, last.evaluation)))  # type: ignore[no-any-return]


def keeps_running_statistics(module: nn.Module) -> bool:
    """Whether a part of a module has a running mean and variance."""
    return any(len(_kept(part)) == 2 for part in module.modules())


def _callable_with(module: nn.Module, batches: list[Any], step: OwnStep) -> tuple[PrivateCall, _Look]:
    wide = any(p.dtype == torch.float64 for p in module.parameters())
    for batch in batches:
        call = PrivateCall(module, step, batch, torch.float64 if wide else torch.float32)
        try:
            return call, _look(call, module)
        except ProbeError:
            if batch is batches[-1]:
                raise
    raise AssertionError("no batch")


def _look(call: PrivateCall, module: nn.Module) -> _Look:
    """What there is to see at the module's weights, in three or four calls."""
    distinct = {name: module.get_parameter(name) for name, _ in call.module.named_parameters()}
    point = {name: p.detach().to(call.dtype).requires_grad_(p.requires_grad) for name, p in distinct.items()}
    exact: Statistics = {}
    with _recording(call.module, exact) as training:
        call.run(point, lambda loss: None, seed=0)
    left = call.left
    averages = _averages(call, point, left)
    modes = {m: m.training for m in call.module.modules()}
    call.module.eval()
    try:
        with _recording(call.module, {}) as evaluation:
            call.run(point, lambda loss: None, seed=0)
    finally:
        for m, mode in modes.items():
            m.training = mode
    return _Look(exact, _pairs(call.module, averages), training, evaluation)


def _averages(call: PrivateCall, point: dict[str, Tensor], left: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a step moves each running average towards, by the name of its buffer.

    A buffer b that becomes αb + (1 − α)s tells α when it starts from b + 1, and so s. What is moved in other ways, such
    as the vectors of spectral normalization, has no such α.
    """
    starts = {name: b.detach().to(call.dtype) for name, b in call.module.named_buffers() if b.is_floating_point()}
    moved = {name: b for name, b in starts.items() if name in left and not torch.equal(left[name], b)}
    if not moved:
        return {}
    call.buffers = {name: b + 1 for name, b in moved.items()}
    try:
        call.run(point, lambda loss: None, seed=0)
    finally:
        call.buffers = {}
    found = {}
    for name, b in moved.items():
        memory = (call.left[name] - left[name]).double()
        # All entries have one memory, but for roundoff of the two calls.
        tolerance = 1e-6 if call.dtype == torch.float64 else 1e-3
        if float(memory.max() - memory.min()) < tolerance and 0 <= float(memory.mean()) < 1 - 1e-3:
            found[name] = ((left[name].double() - memory.mean() * b.double()) / (1 - memory.mean())).cpu()
    return found


def _pairs(module: nn.Module, averages: dict[str, Tensor]) -> Statistics:
    """Mean and variance of modules that keep both, but for BatchNorm, whose own are exact."""
    found: Statistics = {}
    for name, part in module.named_modules():
        keys = {key: f"{name}.{key}".lstrip(".") for key, _ in part.named_buffers(recurse=False)}
        means = [key for key in keys if "mean" in key and keys[key] in averages]
        variances = [key for key in keys if "var" in key and keys[key] in averages]
        if not isinstance(part, _BatchNorm) and len(means) == len(variances) == 1:
            found[name] = averages[keys[means[0]]], averages[keys[variances[0]]]
    return found


def _kept(norm: nn.Module) -> list[Tensor]:
    """Its running mean and variance, as far as it has them."""
    own = dict(norm.named_buffers(recurse=False))
    found = [[b for key, b in own.items() if what in key] for what in ("mean", "var")]
    return [b for buffers in found for b in buffers[:1]]


@contextmanager
def _recording(module: nn.Module, found: Statistics) -> Iterator[list[Tensor]]:
    """Meanwhile the last output of an outermost module is kept, and the statistics of what BatchNorms get are found.

    A step may call its layers one by one; what is in front of a normalization changes with the weights, and may.
    """
    outputs: list[Tensor] = []
    depth = [0]

    # Functions, because they survive deepcopy as they are.
    def enter(part: nn.Module, args: Any) -> None:
        depth[0] += 1

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        depth[0] -= 1
        found = [t.detach().clone() for t in tree_leaves(output) if not depth[0] and _is_real(t)]
        outputs[:] = found or outputs

    def recorder(name: str) -> Callable[..., None]:
        def record(part: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().transpose(0, 1).flatten(1).cpu().double()  # not every device has float64
            found.setdefault(name, (values.mean(dim=1), values.var(dim=1, correction=0)))

        return record

    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue  # takes no hooks
        hooks += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
        if isinstance(part, _BatchNorm):
            hooks.append(part.register_forward_pre_hook(recorder(name)))
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


@torch.no_grad()
def _move(norm: nn.Module, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
    (mean, variance), (new_mean, new_variance) = before, after
    # A channel without variance has no scale to follow; one behind unchanged weights keeps its bits.
    usable = (variance > 0) & (new_variance > 0) & ((mean != new_mean) | (variance != new_variance))
    squared = torch.where(usable, new_variance / torch.where(variance > 0, variance, 1.0), 1.0)
    shift = torch.where(usable, new_mean - squared.sqrt() * mean, 0.0)
    kept = _kept(norm)
    if len(kept) == 2:
        _affine_(kept[0], squared.sqrt(), shift)
        _affine_(kept[1], squared, torch.zeros_like(shift))
    if isinstance(norm, _BatchNorm) and norm.affine:
        eps_share = ((new_variance + norm.eps) / ((variance + norm.eps) * squared)).sqrt()
        _affine_(norm.weight, torch.where(usable, eps_share, 1.0), torch.zeros_like(shift))


def _affine_(tensor: Tensor, factor: Tensor, shift: Tensor) -> None:
    tensor.copy_(tensor.cpu().double() * factor + shift)
