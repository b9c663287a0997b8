"""Calling a module's own loss on a private copy, so that nothing of it can be noticed outside."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from lightning_normreg._symmetries._dispatch import ProbeMode
from lightning_normreg._symmetries._generic_point import generic_point
from lightning_normreg._symmetries._quiet import quiet, silence

Loss = Callable[[nn.Module, Any], Any]
T = TypeVar("T")


class ProbeError(RuntimeError):
    """The module's loss could not be computed on a private copy."""


class NoLossError(ProbeError):
    """This batch has no loss; another one may have."""


class PrivateCall:
    """Computes the loss of a private copy at any point, and hands it to a continuation.

    Args:
        module: Is copied, never called.
        loss: Called as ``loss(copy, batch)``; None for the module's own ``training_step``.
        batch: Tensors in it are copied for every call.
        dtype: Type that everything is computed in.
    """

    def __init__(self, module: nn.Module, loss: Loss | None, batch: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.module = private_copy(module)
        self._what = "`forward`" if loss else "`module.training_step`"
        self._loss = loss or _training_step
        self._batch = batch

    def own_point(self) -> dict[str, Tensor]:
        """The module's parameters, in the probe's type; they share no memory with the copy's."""
        return {name: self._cast(p) for name, p in self.module.named_parameters()}

    def generic_point(self, magnitude: Mapping[str, float], *, seed: int, amount: float) -> dict[str, Tensor]:
        """Parameters that ``magnitude`` names are drawn anew, and require a gradient; the others are as they were."""
        own = dict(self.module.named_parameters())
        rest = {name: self._cast(p) for name, p in own.items() if name not in magnitude}
        drawn = generic_point({name: own[name] for name in magnitude}, magnitude, self.dtype, seed=seed, amount=amount)
        return {**rest, **{name: t.requires_grad_() for name, t in drawn.items()}}

    def run(self, point: Mapping[str, Tensor], then: Callable[[Tensor], T], *, seed: int, shrink: float = 1.0) -> T:
        """Compute the loss at ``point`` and return ``then(loss)``.

        ``then``, for example the backward pass, runs inside of the same functional call: activation checkpointing
        recomputes the forward pass during the backward pass, and would otherwise see the copy's parameters.

        Args:
            point: A tensor for each name of :meth:`own_point`; a tied parameter is given once.
            then: What to do with the loss.
            seed: Of all random numbers that the loss draws.
            shrink: Factor on every eps.

        Raises:
            ProbeError: If the loss raises, or is no scalar.
        """
        buffers = {name: self._cast(b) for name, b in self.module.named_buffers()}
        constants = [b for b in buffers.values() if b.ndim == 0 and b.is_floating_point()]
        devices = {t.device for t in point.values() if t.device.type != "cpu"}
        tensors = {f"inner.{name}": t for name, t in {**buffers, **point}.items()}
        call = _Call(self.module, self._scalar_loss, then)
        try:
            with quiet(self.dtype, devices, seed), ProbeMode(self.dtype, shrink, constants):
                result: T = functional_call(call, tensors, (self._cast(self._batch),))
        except ProbeError:
            raise
        except Exception as error:  # whatever the user's code raises, here or in its backward pass
            raise ProbeError(
                f"{self._what} must be callable on a private copy of the module, but it raised {_shortly(error)}. If "
                "it needs a Trainer, probe where one is attached, for example in a callback's on_train_batch_start; "
                "else pass `forward`, a function of (module, batch) that returns the loss."
            ) from error
        return result

    def _scalar_loss(self, module: nn.Module, batch: Any) -> Tensor:
        result = self._loss(module, batch)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss.reshape(())
        kind = NoLossError if result is None else ProbeError
        if loss is None:
            got = f"a {type(result).__name__} without 'loss'" if isinstance(result, Mapping) else "None"
        else:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise kind(
            f"{self._what} must return the loss, a scalar tensor or a mapping with one under 'loss', but it returned "
            f"{got}. Pass a batch for which it does, or `forward`, a function of (module, batch) that returns the loss."
        )

    def _cast(self, batch: Any) -> Any:
        return apply_to_collection(batch, Tensor, lambda t: _to(t, self.dtype))


class _Call(nn.Module):
    def __init__(self, inner: nn.Module, loss: Loss, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self._loss, self._then = loss, then

    def forward(self, batch: Any) -> Any:
        return self._then(self._loss(self.inner, batch))


def private_copy(module: nn.Module) -> nn.Module:
    """Deep copy that logs nowhere; a LightningModule keeps seeing its Trainer, which it may only read.

    Parameters share their memory with the module's, as long as nobody but :class:`PrivateCall` calls the copy.

    Raises:
        ProbeError: If the module cannot be copied.
    """
    try:
        twin = copy.deepcopy(module, _copied_already(module))
    except Exception as error:
        raise ProbeError(
            f"`module` must survive copy.deepcopy, because the probe works on a private copy, but "
            f"{type(module).__name__} raised {_shortly(error)}. Drop what cannot be copied (open files, locks, "
            f"generators) from its attributes, or give it a `__deepcopy__`."
        ) from error
    _rebind_compiled(twin, module)
    silence(twin, module)
    return twin


def _rebind_compiled(twin: nn.Module, module: nn.Module) -> None:
    # A compiled method that is kept in an attribute, as Lightning does for torch.compile(module), is copied with the
    # module that it is bound to: the copy would compute the original's loss, which none of its parameters reaches.
    for original, part in zip(module.modules(), twin.modules(), strict=True):
        for name, value in list(vars(part).items()):
            method = getattr(value, "_torchdynamo_orig_callable", None)
            if inspect.ismethod(method) and method.__self__ is original:
                vars(part)[name] = MethodType(method.__func__, part)


def _copied_already(module: nn.Module) -> dict[int, Any]:
    """What deepcopy shall not copy itself, by id."""
    # Every call replaces all parameters by a point, so these are only ever read: a second set would be a waste.
    memo: dict[int, Any] = {}
    for p in module.parameters():
        if type(p) is nn.Parameter:
            alias = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            vars(alias).update(vars(p))
            memo[id(p)] = alias
    # Tensors in the middle of a graph, such as the weight that legacy weight_norm leaves behind, refuse to be copied.
    # The next forward pass makes them anew.
    leaves = [leaf for m in module.modules() for leaf in tree_leaves(vars(m))]
    memo.update({id(t): t.detach().clone() for t in leaves if isinstance(t, Tensor) and not t.is_leaf})
    return memo


def check_callable(module: nn.Module, batch: Any, loss: Loss | None) -> None:
    """Raise a ``ValueError`` that says what to pass, where the loss cannot be computed as things stand."""
    name = type(module).__name__
    remedy = "pass `forward`, a function of (module, batch) that returns the loss."
    if not module.training:
        raise ValueError(
            f"`module` must be in training mode, because scale invariance is asked of the loss that is trained, but "
            f"{name}.training is False. Call module.train() first; submodules may stay in eval mode."
        )
    if loss is not None:
        return
    if not callable(getattr(module, "training_step", None)):
        raise ValueError(f"`module` must have a training_step, or `forward` be given, but {name} has none: {remedy}")
    if getattr(module, "automatic_optimization", True) is False:
        raise ValueError(
            f"`module` must use automatic optimization, or `forward` be given: the training_step of {name} steps its "
            f"optimizers itself (automatic_optimization=False). To probe one loss of it, {remedy}"
        )
    if batch is None:
        raise ValueError(f"`batch` must be given, so that the training_step of {name} can be called. A few samples do.")


def _training_step(module: nn.Module, batch: Any) -> Any:
    parameters = inspect.signature(module.training_step).parameters  # type: ignore[arg-type]
    if "dataloader_iter" in parameters:
        raise ValueError("a training_step that fetches its own batches (dataloader_iter) cannot be given one")
    # As Lightning does: the index of the batch comes second, whatever its name.
    kinds = [parameter.kind for parameter in parameters.values()]
    second = kinds[1:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] or inspect.Parameter.VAR_POSITIONAL in kinds
    index = [0] if second else []
    return module.training_step(batch, *index)  # type: ignore[operator]


def _shortly(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        dtype = dtype.to_complex()
    elif not tensor.is_floating_point():
        dtype = tensor.dtype
    return tensor.detach().to(dtype, copy=True)
