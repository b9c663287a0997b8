"""Copies of modules and batches, of whatever types they are made, with tensors in the type of the probe."""

from __future__ import annotations

import copy
import inspect
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_normreg._weights import same_memory

T = TypeVar("T")


class _Casting(TorchFunctionMode):
    """While something is copied: tensors change their type, and those in the middle of a graph leave it.

    Those, such as the weight that legacy weight_norm leaves behind, would refuse to be copied.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = cast(tensor, self._dtype).requires_grad_(tensor.requires_grad and tensor.is_leaf)
        return memo[id(tensor)]


def copied(value: T, dtype: torch.dtype | None, memo: dict[int, Any]) -> T:
    """Deep copy in which real tensors have ``dtype``, None for their own; ``memo`` as for ``copy.deepcopy``."""
    with _Casting(dtype):
        return copy.deepcopy(value, memo)


def copied_module(module: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, list[Any]]:
    """A copy that shares parameters and buffers, which every call replaces, and everything that was copied for it."""
    memo: dict[int, Any] = {id(b): b for b in module.buffers()}
    for p, first in same_memory(module).items():
        if type(p) is nn.Parameter:
            if id(first) not in memo:
                memo[id(first)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            memo[id(p)] = memo[id(first)]
            vars(memo[id(p)]).update(vars(p))
    twin = copied(module, dtype, memo)
    _rebind_compiled(twin, module)
    return twin, list(memo.values())


def _rebind_compiled(twin: nn.Module, module: nn.Module) -> None:
    # A compiled method that is kept in an attribute, as Lightning does for torch.compile(module), is copied with the
    # module that it is bound to: the copy would compute the original's loss, which none of its parameters reaches.
    for original, part in zip(module.modules(), twin.modules(), strict=True):
        for name, value in list(vars(part).items()):
            method = getattr(value, "_torchdynamo_orig_callable", None)
            if inspect.ismethod(method) and method.__self__ is original:
                vars(part)[name] = MethodType(method.__func__, part)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy outside of any graph, in ``dtype`` or the complex type of that width; other numbers stay what they are."""
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        dtype = tensor.dtype
    elif tensor.is_complex():
        dtype = dtype.to_complex()
    return tensor.detach().to(dtype, copy=True)
