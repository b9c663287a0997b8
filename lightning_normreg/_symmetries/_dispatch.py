"""Rewriting single operators while the private copy runs: wider types, random numbers, an eps of next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_normreg._symmetries._random import drawn, is_random, on_cpu

aten = torch.ops.aten

LARGEST_EPS = 1e-3
"""Constants up to here that are added to something count as the eps of a normalization (EfficientNet's is 1e-3)."""

_ADDS = {aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor, aten.add_.Scalar}
_MASKS = {
    aten.mul.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.tril.default,
    aten.triu.default,
}
_WIDER = {
    torch.float64: {
        torch.float16: torch.float64,
        torch.bfloat16: torch.float64,
        torch.float32: torch.float64,
        torch.complex64: torch.complex128,
    },
    torch.float32: {torch.float16: torch.float32, torch.bfloat16: torch.float32},
}


class ProbeMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Below autograd, so that it also reaches what activation checkpointing recomputes during the backward pass.

    Four changes: a cast to a narrower type becomes a cast to the probe's type (models that compute norms or softmax
    "in float32", inner autocast), and what has torch's default type because no other was there to choose (factories,
    quotients of integers) gets it too; random numbers of the CPU come from ``generator``; every eps is multiplied by
    ``shrink``; and rows of an embedding under ``padding_idx`` get the gradient that they have by calculus, which torch
    leaves out although the loss depends on them.

    Args:
        dtype: The probe's type.
        shrink: Factor on every eps, 1 to keep them.
        constants: 0-dimensional buffers, which are how some models keep their eps.
        generator: Of the CPU.

    Attributes:
        masked: Identity of a weight → the entries that a mask has taken out of it.
    """

    def __init__(
        self, dtype: torch.dtype, shrink: float, constants: Sequence[Tensor], generator: torch.Generator
    ) -> None:
        self.masked: dict[int, Tensor] = {}
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype, self._generator = dtype, generator
        self._wider = _WIDER[dtype]
        self._shrink = shrink
        self._constants = constants

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in self._wider:
            kwargs["dtype"] = self._wider[kwargs["dtype"]]
        if func is aten.embedding_dense_backward.default:
            args = (*args[:3], -1, *args[4:])
        elif self._shrink != 1.0:
            args, kwargs = self._shrunk(func, args, kwargs)
        if is_random(func) and on_cpu(args, kwargs):
            result = drawn(func, args, kwargs, self._generator)
        else:
            result = func(*args, **kwargs)
        if func in _MASKS:
            self._note_mask(func, args, kwargs, result)
        return self._typed(func, args, result)

    def _note_mask(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        if len(tensors) == 1 and tensors[0].is_leaf and result.shape == tensors[0].shape and result.ndim > 1:
            moved = func(*(arg + 1 if arg is tensors[0] else arg for arg in args), **kwargs)
            before = self.masked.get(id(tensors[0]), torch.zeros_like(result, dtype=torch.bool))
            self.masked[id(tensors[0])] = before | (result == moved)

    def _typed(self, func: Any, args: Any, result: Any) -> Any:
        """The result in the probe's type, where it has the default one for want of another."""
        default = torch.get_default_dtype()
        if default == self._dtype or not isinstance(result, Tensor) or result.dtype != default:
            return result
        # lift_fresh is what torch.tensor ends with.
        chosen = func is not aten.lift_fresh.default and any(
            leaf.is_floating_point() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)
        )
        return result if chosen else result.to(self._dtype)

    def _shrunk(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if func in _ADDS:
            if len(args) > 1 and is_eps(args[1], self._constants):
                args = (args[0], args[1] * self._shrink, *args[2:])
            return args, kwargs
        for position, name in _eps_arguments(func):
            if isinstance(kwargs.get(name), float):
                kwargs[name] *= self._shrink
            elif len(args) > position and isinstance(args[position], float):
                args = (*args[:position], args[position] * self._shrink, *args[position + 1 :])
        return args, kwargs


def is_eps(value: object, constants: Sequence[Tensor] = ()) -> bool:
    """Whether something that is added looks like an eps: a small positive number, or a buffer that holds one.

    A 0-dimensional tensor that is no buffer may be anything, such as a part of the loss or of a gradient.
    """
    if isinstance(value, Tensor):
        return any(value is constant for constant in constants) and 0 < float(value) <= LARGEST_EPS
    return isinstance(value, float) and 0 < value <= LARGEST_EPS


@cache
def _eps_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.name in ("eps", "epsilon"))
