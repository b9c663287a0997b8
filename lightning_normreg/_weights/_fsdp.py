"""What FSDP keeps of the weights that it gathers: in the way of whoever writes to shards, or asks in another type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lightning_normreg._compat import is_named


def reshard(model: nn.Module, *, aborted: bool = False) -> None:
    """Let FSDP forget the whole weights that it keeps after a validation: they would hide what is written to shards.

    Args:
        model: The outermost module.
        aborted: Whether a forward or backward pass has raised in the middle, which FSDP must forget as well.
    """
    for part in model.modules():
        handle: Any = getattr(part, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if is_named(part, "FSDPModule"):
            if aborted and hasattr(part, "reset_iter_state"):
                with contextlib.suppress(RuntimeError):  # which says that it is not the root
                    part.reset_iter_state()  # type: ignore[operator]
            part.reshard()  # type: ignore[operator]
        elif is_named(part, "FullyShardedDataParallel") and hasattr(flat, "_local_shard"):
            handle.reshard(True)  # before the first forward pass there is nothing to forget
            if aborted and hasattr(flat, "_post_backward_hook_state"):  # it would not hook the next pass
                vars(flat).pop("_post_backward_hook_state")[-1].remove()


@contextlib.contextmanager
def in_type_of_weights(model: nn.Module) -> Iterator[None]:
    """Let FSDP compute in the type of its shards, whatever mixed precision it has; casts must be redirected besides.

    Weights must be sharded before and after.

    Raises:
        NotImplementedError: If it cannot be told to.
    """
    parts = list(model.modules())
    try:
        widened = _widen([part for part in parts if is_named(part, "FullyShardedDataParallel")])
        _forget([part for part in parts if is_named(part, "FSDPModule")])
    except (AttributeError, ImportError) as error:
        raise NotImplementedError(
            f"FSDP does not say in torch {torch.__version__} where it gathers weights in another type ({error})."
        ) from error
    try:
        yield
    finally:
        for handle, types in widened:
            handle._fwd_bwd_param_dtype, handle._reduce_dtype = types
            handle.init_flat_param_attributes()
        _forget([part for part in parts if is_named(part, "FSDPModule")])


def _widen(parts: list[Any]) -> list[tuple[Any, tuple[torch.dtype, torch.dtype]]]:
    """FSDP's first version has a type for each flat vector, and memory for it."""
    handles = [part._handle for part in parts if getattr(part, "_handle", None) is not None]
    narrow = [h for h in handles if h._uses_param_mixed_precision or h._uses_reduce_mixed_precision]
    if narrow:
        fsdp = import_module("torch.distributed.fsdp._runtime_utils")
        for part in parts:  # what its first forward pass would set up in its own types
            fsdp._lazy_init(part, part)
    found = [(handle, (handle._fwd_bwd_param_dtype, handle._reduce_dtype)) for handle in narrow]
    for handle in narrow:
        handle._fwd_bwd_param_dtype = handle._reduce_dtype = handle._orig_param_dtype
        handle.init_flat_param_attributes()
    return found


def _forget(parts: list[Any]) -> None:
    """What the second version has gathered narrow weights into is of the type in which it was first used."""
    for part in parts:
        groups = [g for g in part._get_fsdp_state()._fsdp_param_groups if g.mp_policy.param_dtype is not None]
        for parameter in (p for group in groups for p in group.fsdp_params):
            parameter.all_gather_outputs = []
            vars(parameter).pop("_unsharded_param", None)
