"""Calling a module's own loss on a private copy, so that nothing of it can be noticed outside."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_normreg._symmetries._copies import cast, copied, copied_module
from lightning_normreg._symmetries._dispatch import ProbeMode
from lightning_normreg._symmetries._generic_point import generic_point
from lightning_normreg._symmetries._losses import Losses, ManualLosses, NoLossError, OneLoss, PlainBackward, ProbeError
from lightning_normreg._symmetries._quiet import quiet
from lightning_normreg._symmetries._random import seed_all
from lightning_normreg._symmetries._slices import Table, Tables
from lightning_normreg._symmetries._stand_ins import attach
from lightning_normreg._weights import Shard, same_memory

Loss = Callable[[nn.Module, Any], Any]
T = TypeVar("T")


class OwnStep:
    """The module's own ``training_step``, as Lightning calls it for batch number ``index``; ``through`` a strategy."""

    def __init__(self, index: int = 0, through: Callable[..., Any] | None = None) -> None:
        self._index, self._through = index, through

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        """Its loss, whatever it has to return."""
        parameters = inspect.signature(module.training_step).parameters  # type: ignore[arg-type]
        if "dataloader_iter" in parameters:
            raise ValueError("a training_step that fetches its own batches (dataloader_iter) cannot be given one")
        # As Lightning does: the index of the batch comes second, whatever its name.
        kinds = [parameter.kind for parameter in parameters.values()]
        second = kinds[1:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] or inspect.Parameter.VAR_POSITIONAL in kinds
        step: Any = self._through or module.training_step
        return step(batch, *([self._index] if second else []))


class Call(ABC):
    """Computes the loss at any point, and hands it to a continuation.

    A point has for each name of a parameter what this process holds of it.

    Args:
        module: The module.
        loss: Called as ``loss(module, batch)``; None for the module's own ``training_step``.
        batch: Is copied for every call.
        dtype: Type that everything is computed in.

    Attributes:
        shards: How parameters are spread over processes, of those that are.
        in_place: Whether the real module is called, and not a copy.
        masked: Name → entries that a mask took out in the last call; not known of what is called in place.
    """

    in_place = False
    _where = "on a private copy of the module"

    def __init__(self, module: nn.Module, loss: Loss | None, batch: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.shards: Mapping[str, Shard] = {}
        self.masked: dict[str, Tensor] = {}
        self._real = module
        self._loss = loss or OwnStep()
        own = isinstance(self._loss, OwnStep)
        self._what = "`module.training_step`" if own else "`forward`"
        self._is_manual = own and getattr(module, "automatic_optimization", True) is False
        self._batch = batch
        self._one = OneLoss

    @abstractmethod
    def own_point(self) -> dict[str, Tensor]:
        """The module's parameters, in the probe's type, trained or frozen; nobody writes to them."""

    @abstractmethod
    def generic_point(self, magnitude: Mapping[str, float], *, seed: int, amount: float) -> dict[str, Tensor]:
        """Parameters that ``magnitude`` names are drawn anew, and require a gradient; the others are as they were."""

    def shape(self, name: str, part: Tensor) -> torch.Size:
        """Of the whole parameter of which this process holds a part."""
        return self.shards[name].shape if name in self.shards else part.shape

    def largest(self, value: float) -> float:
        """Of a number that each process has."""
        return value

    @contextlib.contextmanager
    def watched(self, names: dict[int, str]) -> Iterator[None]:
        """While it lasts, identities of what stands for weights in a call are put into ``names``, with their names."""
        yield

    def summed(self, found: Mapping[str, Tables]) -> dict[str, Tables]:
        """Sums over the slices of each parameter, of the parts that all processes hold; on the CPU."""
        return {n: {a: Table(*(v.cpu() for v in table)) for a, table in t.items()} for n, t in found.items()}

    def run(self, point: Mapping[str, Tensor], then: Callable[[Losses], T], *, seed: int, shrink: float = 1.0) -> T:
        """Compute the loss at ``point`` and return ``then`` of it.

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
        try:
            return self._run(point, then, seed, shrink)
        except ProbeError:
            raise
        except Exception as error:  # whatever the user's code raises, here or in its backward pass
            if "use_reentrant" in str(error) and self._one is OneLoss:
                self._one = PlainBackward
                return self.run(point, then, seed=seed, shrink=shrink)
            raise ProbeError(
                f"{self._what} must be callable {self._where}, but it raised {_shortly(error)}. If "
                "it needs a Trainer, probe where one is attached, for example in a callback's on_train_batch_start; "
                "else pass `forward`, a function of (module, batch) that returns the loss."
            ) from error

    @abstractmethod
    def _run(self, point: Mapping[str, Tensor], then: Callable[[Losses], T], seed: int, shrink: float) -> T:
        """See :meth:`run`."""

    def _trainer(self) -> Any:
        """The real Trainer; where a manual step has none, something with optimizers."""
        try:
            trainer = getattr(self._real, "trainer", None)
        except RuntimeError:  # Lightning's way to say that there is none
            trainer = None
        if trainer is None and self._is_manual:
            optimizers, schedulers = configured(self._real.configure_optimizers())  # type: ignore[operator]
            trainer = SimpleNamespace(
                optimizers=optimizers, lr_scheduler_configs=[SimpleNamespace(scheduler=s) for s in schedulers],
                strategy=SimpleNamespace(_lightning_optimizers=optimizers), logger=None, loggers=[], current_epoch=0,
                global_step=0, is_global_zero=True,
            )  # fmt: skip
        return trainer

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


class PrivateCall(Call):
    """The loss of a private copy.

    Each call has a fresh copy, so that a step that keeps state starts from the same one every time. The module is
    copied, never called.

    Attributes:
        buffers: What stands in place of some of the module's buffers in the coming calls.
        left: What the last call has made of all buffers.

    Raises:
        ProbeError: If the module cannot be copied.
    """

    def __init__(self, module: nn.Module, loss: Loss | None, batch: Any, dtype: torch.dtype) -> None:
        super().__init__(module, loss, batch, dtype)
        self.module = self._copy(module, None, 0)
        self.buffers: dict[str, Tensor] = {}
        self.left: dict[str, Tensor] = {}
        names = {p: name for name, p in module.named_parameters()}
        self._names = {id(p): names[first] for p, first in same_memory(module).items()}

    def own_point(self) -> dict[str, Tensor]:
        """See :class:`Call`."""
        return {n: cast(p, self.dtype).requires_grad_(p.requires_grad) for n, p in self.module.named_parameters()}

    def generic_point(self, magnitude: Mapping[str, float], *, seed: int, amount: float) -> dict[str, Tensor]:
        """See :class:`Call`."""
        own = dict(self.module.named_parameters())
        rest = {name: cast(p, self.dtype) for name, p in own.items() if name not in magnitude}
        drawn = generic_point({name: own[name] for name in magnitude}, magnitude, self.dtype, seed=seed, amount=amount)
        return {**rest, **{name: t.requires_grad_() for name, t in drawn.items()}}

    def _run(self, point: Mapping[str, Tensor], then: Callable[[Losses], T], seed: int, shrink: float) -> T:
        twin = self._copy(self.module, self.dtype, seed)
        buffers = {name: cast(b, self.dtype) for name, b in self.module.named_buffers()} | dict(self.buffers)
        constants = [b for b in buffers.values() if b.ndim == 0 and b.is_floating_point()]
        devices = {t.device for t in point.values() if t.device.type != "cpu"}
        tensors = {f"inner.{name}": t for name, t in {**buffers, **point}.items()}
        generator = torch.Generator().manual_seed(seed)
        manual = ManualLosses(list(point.values())) if self._is_manual else None
        points = {key: point[name] for key, name in self._names.items()}

        def losses(module: nn.Module, batch: Any) -> T:
            if manual is None:
                return then(self._one(self._scalar_loss(module, batch)))
            with manual:
                self._loss(module, batch)
                manual.finish()
                return then(manual)

        with quiet(devices, generator), ProbeMode(self.dtype, shrink, constants, generator) as mode:
            attach(twin, self._trainer(), points, self._real, manual)
            batch = copied(self._batch, self.dtype, {})
            result: T = functional_call(_Call(twin, losses), tensors, (batch,))
        self.left = {name: tensors[f"inner.{name}"] for name in buffers}
        self.masked = {name: mode.masked[id(t)] for name, t in point.items() if id(t) in mode.masked}
        return result

    def _copy(self, module: nn.Module, dtype: torch.dtype | None, seed: int) -> nn.Module:
        try:
            twin, objects = copied_module(module, dtype)
        except Exception as error:
            raise ProbeError(
                f"`module` must survive copy.deepcopy, because the probe works on a private copy, but "
                f"{type(module).__name__} raised {_shortly(error)}. Drop what cannot be copied (open files, locks, "
                f"generators) from its attributes, or give it a `__deepcopy__`."
            ) from error
        if dtype is not None:
            seed_all(objects, seed)
        return twin


class _Call(nn.Module):
    def __init__(self, inner: nn.Module, losses: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.inner = inner
        self._losses = losses

    def forward(self, batch: Any) -> Any:
        return self._losses(self.inner, batch)


def configured(result: Any) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers in what ``configure_optimizers`` returns, in any of the forms that Lightning knows."""
    if isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Sequence) for part in result):
        optimizers, schedulers = result
        return list(optimizers), [s["scheduler"] if isinstance(s, Mapping) else s for s in schedulers]
    each = list(result) if isinstance(result, Sequence) else [result] if result else []
    optimizers = [e["optimizer"] if isinstance(e, Mapping) else e for e in each]
    schedulers = [e["lr_scheduler"] for e in each if isinstance(e, Mapping) and "lr_scheduler" in e]
    return optimizers, [s["scheduler"] if isinstance(s, Mapping) else s for s in schedulers]


def check_callable(module: nn.Module, batch: Any, loss: Loss | None) -> None:
    """Raise a ``ValueError`` that says what to pass, where the loss cannot be computed as things stand."""
    name = type(module).__name__
    remedy = "pass `forward`, a function of (module, batch) that returns the loss."
    if not module.training:
        raise ValueError(
            f"`module` must be in training mode, because scale invariance is asked of the loss that is trained, but "
            f"{name}.training is False. Call module.train() first; submodules may stay in eval mode."
        )
    if loss is not None and not isinstance(loss, OwnStep):
        return
    if not callable(getattr(module, "training_step", None)):
        raise ValueError(f"`module` must have a training_step, or `forward` be given, but {name} has none: {remedy}")
    if batch is None:
        raise ValueError(f"`batch` must be given, so that the training_step of {name} can be called. A few samples do.")


def _shortly(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")
