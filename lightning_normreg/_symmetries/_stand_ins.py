"""What a private copy sees of the run: Trainer, loggers, optimizers, schedulers, of which nothing real can change."""

from __future__ import annotations

import contextlib
import copy
import enum
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normreg._symmetries._losses import ManualLosses

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, type, FunctionType, BuiltinFunctionType, ModuleType,
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_SILENT = ("save", "log_", "print", "fit", "validate", "test", "predict")
"""Beginnings of the names of methods that would leave something behind; they do nothing."""


class Nothing:
    """Whatever is asked of it, it answers with itself."""

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return self

    def __getitem__(self, key: Any) -> Nothing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Nothing]:
        return iter(())

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *args: object) -> None:
        pass


class StandIn:
    """Answers as something real does, but whatever is set on it stays here.

    Methods run on the stand-in, containers and tensors are copies, and other objects are stand-ins in turn.

    Args:
        real: What it stands for.
        known: Identity of real objects → what stands for them; grows.
    """

    def __init__(self, real: Any, known: dict[int, Any]) -> None:
        self.__dict__.update(_real=real, _known=known)
        known[id(real)] = self

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._real, name)
        if isinstance(value, MethodType) and value.__self__ is self._real:
            value = Nothing() if name.startswith(_SILENT) else MethodType(value.__func__, self)
        else:
            value = self._stand_in(value)
        self.__dict__[name] = value
        return value

    def _stand_in(self, value: Any) -> Any:
        if id(value) in self._known or isinstance(value, _PLAIN):
            return self._known.get(id(value), value)
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, Mapping):
            return {key: self._stand_in(v) for key, v in value.items()}
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(map(self._stand_in, value))
        if hasattr(value, "__next__"):
            return copy.deepcopy(value)  # what cannot be copied says so
        return StandIn(value, self._known)

    def __len__(self) -> int:
        return len(self._real)

    def __bool__(self) -> bool:
        return bool(self._real)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real)

    def __getitem__(self, key: Any) -> Any:
        return self._stand_in(self._real[key])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real(*args, **kwargs)


class OptimizerStandIn(StandIn):
    """An optimizer whose groups can be read and set, whose closures run, and that moves no weight.

    Args:
        real: An optimizer, or Lightning's wrapper around one.
        known: As for :class:`StandIn`.
        points: Identity of the real parameters → the tensors that the copy has instead.
        twin: The copy.
        losses: Told of each step, and where gradients are dropped; None where nothing counts.
    """

    def __init__(
        self,
        real: Any,
        known: dict[int, Any],
        *,
        points: Mapping[int, Tensor],
        twin: Any,
        losses: ManualLosses | None,
    ) -> None:
        super().__init__(real, known)
        groups = [
            {key: self._stand_in(value) for key, value in group.items() if key != "params"}
            | {"params": [points.get(id(p), p) for p in group["params"]]}
            for group in real.param_groups
        ]
        self.__dict__.update(param_groups=groups, state=defaultdict(dict), _twin=twin, _losses=losses)
        self.__dict__.update(optimizer=self, _optimizer=self, _points=None, _copies={})

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, MethodType) and value.__self__ is self:
            value = self.__dict__[name] = partial(self._on_copies, value)
        return value

    def _stand_in(self, value: Any) -> Any:
        return self if isinstance(value, Optimizer) else super()._stand_in(value)  # the one that it wraps

    def _on_copies(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let another method than ``step``, as the two of SAM, move copies: all gradients are taken at one point."""
        if self._points is not None:  # called by another one
            return method(*args, **kwargs)
        points = [group["params"] for group in self.param_groups]
        everything = self.__dict__["_points"] = [p for params in points for p in params]
        for p in everything:
            if id(p) not in self._copies:
                self._copies[id(p)] = p.detach().clone().requires_grad_(p.requires_grad)
            self._copies[id(p)].grad = p.grad
        try:
            for group in self.param_groups:
                group["params"] = [self._copies[id(p)] for p in group["params"]]
            return method(*args, **kwargs)
        finally:
            self.__dict__["_points"] = None
            for group, params in zip(self.param_groups, points, strict=True):
                group["params"] = params

    def _parameters(self) -> list[Tensor]:
        return self._points or [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Callable[[], Any] | None = None, **_kwargs: Any) -> Any:
        """Run the closure, and let the gradients count."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._losses is not None:
            self._losses.step(self._parameters())
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those on the copy."""
        if self._losses is not None:
            self._losses.clear(self._parameters())

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """As Lightning's optimizers have it."""
        self._twin.toggle_optimizer(self)
        yield
        self._twin.untoggle_optimizer(self)


def attach(
    twin: nn.Module, trainer: Any, points: Mapping[int, Tensor], module: nn.Module, losses: ManualLosses | None
) -> None:
    """Make a copy log nowhere, and let it see stand-ins for the Trainer and all that is on it.

    Args:
        twin: The copy.
        trainer: The real one; None if there is none.
        points: Identity of the real parameters → the tensors that the copy has instead.
        module: The real one, in whose place the Trainer's stand-in has the copy.
        losses: Told of each step of an optimizer; None where nothing counts.
    """
    for part in twin.modules():
        if all(hasattr(part, name) for name in ("training_step", "log", "log_dict")):
            part.log = part.log_dict = part.print = lambda *_args, **_kwargs: None  # type: ignore[assignment]
            part.manual_backward = lambda loss, *args, **kwargs: loss.backward(*args, **kwargs)  # type: ignore[assignment]
            part.clip_gradients = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    if trainer is None:
        return
    known: dict[int, Any] = {id(module): twin}
    for logger in getattr(trainer, "loggers", None) or [getattr(trainer, "logger", None)]:
        if logger is not None:
            known[id(logger)] = Nothing()
    wrappers = list(getattr(getattr(trainer, "strategy", None), "_lightning_optimizers", []))
    for real in getattr(trainer, "optimizers", []):
        stand_in = OptimizerStandIn(real, known, points=points, twin=twin, losses=losses)
        known.update({id(w): stand_in for w in wrappers if getattr(w, "_optimizer", w) is real})
    twin.trainer = StandIn(trainer, known)  # type: ignore[assignment]
