"""What a loss, or the several losses of a manual training_step, say at one point: values, and gradients that count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_normreg._weights import gradient_of

Gradients = tuple[Tensor | None, ...]


class ProbeError(RuntimeError):
    """The module's loss could not be computed."""


class NoLossError(ProbeError):
    """This batch has no loss; another one may have."""


class Losses(ABC):
    """Inside of the call that computed them."""

    @abstractmethod
    def values(self) -> list[float]:
        """One number for each loss."""

    @abstractmethod
    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        """Sum over the losses, for each weight those whose gradient reaches it before its optimizer steps."""

    def gradients_of(self, value: Tensor, weights: Sequence[Tensor]) -> Gradients:
        """Those of something else that was computed on the way; private calls may ask for several."""
        return torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)

    @abstractmethod
    def reaching(self, weights: Sequence[Tensor]) -> list[set[int]]:
        """For each weight the numbers of those losses."""


class OneLoss(Losses):
    """What an automatic training_step, or ``forward``, returns."""

    def __init__(self, loss: Tensor) -> None:
        self._loss = loss

    def values(self) -> list[float]:
        """See :class:`Losses`."""
        return [float(self._loss.detach())]

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        """See :class:`Losses`."""
        self._check()
        # Not loss.backward(), which would also leave gradients on whatever the user's code holds outside of the module.
        return torch.autograd.grad(self._loss, weights, allow_unused=True)

    def reaching(self, weights: Sequence[Tensor]) -> list[set[int]]:
        """See :class:`Losses`."""
        return [{0} for _ in weights]

    def _check(self) -> None:
        if not self._loss.requires_grad:
            raise ProbeError(
                "The loss must depend on a trainable parameter, but it has no gradient. Return it undetached."
            )


class PlainBackward(OneLoss):
    """By ``loss.backward()``, on which reentrant activation checkpointing insists."""

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        """See :class:`Losses`."""
        self._loss.backward()  # type: ignore[no-untyped-call]
        return tuple(weight.grad for weight in weights)


class InPlaceLoss(OneLoss):
    """Of the real module, by ``backward``, because sharded weights get their gradients from hooks of theirs.

    Args:
        loss: The loss.
        parameters: Identity of what stands for a weight → the parameter, and those that are the same memory.
    """

    def __init__(self, loss: Tensor, parameters: Mapping[int, Sequence[nn.Parameter]]) -> None:
        super().__init__(loss)
        self._parameters = parameters

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        """See :class:`Losses`; what this process holds of them."""
        self._check()
        return self.gradients_of(self._loss, weights)

    def gradients_of(self, value: Tensor, weights: Sequence[Tensor]) -> Gradients:
        """See :class:`Losses`; only once, because sharded weights are gone after that."""
        # The loss takes part in any case: weights are gathered for a module's backward pass when that reaches its end.
        (value if value is self._loss else value + 0 * self._loss).backward()  # type: ignore[no-untyped-call]
        found = ([gradient_of(p).to_dense() for p in self._parameters[id(weight)]] for weight in weights)
        return tuple(sum(others, first) for first, *others in found)


_BACKWARDS = {torch.autograd.backward, Tensor.backward}
_ARGUMENTS = ("gradient", "retain_graph", "create_graph", "inputs")


class ManualLosses(TorchFunctionMode, Losses):
    """Notes each backward pass of a manual training_step that runs inside of it, and which gradients optimizers take.

    Args:
        weights: Leaves that the step's gradients go to.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._values: list[Tensor] = []
        self._taken: dict[int, Tensor] = {}
        self._waiting: dict[int, set[int]] = {}
        self._reaching: dict[int, set[int]] = {}
        self._trained = [(w, w.requires_grad) for w in weights]
        self._hooks: list[Any] = []

    def __enter__(self) -> ManualLosses:
        for weight, is_trained in self._trained:
            weight.grad = None
            if is_trained:
                self._hooks.append(weight.register_post_accumulate_grad_hook(self._note))  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        for weight, is_trained in self._trained:
            weight.grad = None
            weight.requires_grad_(is_trained)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _BACKWARDS:
            losses = args[0] if args else kwargs["tensors"]
            self._values.extend(t.detach().sum() for t in ([losses] if isinstance(losses, Tensor) else losses))
            if func is Tensor.backward:  # the graph is kept, because the eps shares go back through it once more
                args, kwargs = args[:1], {**dict(zip(_ARGUMENTS, args[1:], strict=False)), **kwargs}
                kwargs["retain_graph"] = True
        return func(*args, **kwargs)

    def _note(self, weight: Tensor) -> None:
        self._waiting.setdefault(id(weight), set()).add(len(self._values) - 1)

    def step(self, parameters: Sequence[Tensor]) -> None:
        """An optimizer takes the gradients of these parameters."""
        for p in parameters:
            if p.grad is not None:
                before = self._taken.get(id(p))
                self._taken[id(p)] = p.grad.detach().clone() if before is None else before + p.grad.detach()
                self._reaching.setdefault(id(p), set()).update(self._waiting.get(id(p), set()))

    def clear(self, parameters: Sequence[Tensor]) -> None:
        """The gradients of these parameters are dropped."""
        for p in parameters:
            p.grad = None
            self._waiting.pop(id(p), None)

    def finish(self) -> None:
        """Gradients of a step in which no optimizer steps are accumulated for a later one, and count as well."""
        if not self._values:
            raise ProbeError("A manual training_step must call manual_backward or backward, but it did not.")
        if not self._taken:
            self.step([weight for weight, _ in self._trained])

    def values(self) -> list[float]:
        """See :class:`Losses`."""
        return [float(value) for value in self._values]

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        """See :class:`Losses`."""
        return tuple(self._taken.get(id(weight)) for weight in weights)

    def reaching(self, weights: Sequence[Tensor]) -> list[set[int]]:
        """See :class:`Losses`."""
        return [self._reaching.get(id(weight), set()) for weight in weights]
