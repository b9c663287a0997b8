"""Where the flat pieces of FSDP's first version lie in the parameters that they are of.

With ``use_orig_params=True`` every parameter is a view of the process's piece of one long vector: one-dimensional,
maybe empty, cut in the middle of a row. What it was before, only private attributes of torch say; where these are
missing, it is refused rather than guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_normreg._compat import is_named


@dataclass(frozen=True)
class FlatPiece:
    """Entries ``start`` to ``stop`` of a parameter, counted in its own order."""

    shape: torch.Size  # of the whole parameter
    start: int  # first local entry
    stop: int  # the entry after the last
    groups: tuple[dist.ProcessGroup, ...]  # process groups over which it is spread


_PIECES = WeakTensorKeyDictionary()  # to FlatPiece; others compare tensors by their entries


def find_flat_pieces(model: nn.Module) -> None:
    """Note the pieces of a model, before anything is asked of them; does nothing where there are none.

    Raises:
        NotImplementedError: If the original parameters are not kept, or this torch does not say where pieces lie.
    """
    for module in model.modules():
        if not is_named(module, "FullyShardedDataParallel"):
            continue
        handle = getattr(module, "_handle", None)
        if handle is None:
            continue  # a wrapper without parameters of its own
        flat = handle.flat_param
        if getattr(flat, "_params", None) is None:
            raise NotImplementedError(
                "`use_orig_params` of FSDPStrategy must be True (Lightning's default), because only then the optimizer "
                "has a parameter for each weight. Use FSDPStrategy(use_orig_params=True), or ModelParallelStrategy."
            )
        try:
            _note(handle, flat)
        except AttributeError as error:
            raise NotImplementedError(
                f"FSDP's first version does not say in torch {torch.__version__} where its shards lie ({error}). Use "
                "ModelParallelStrategy with fully_shard (FSDP2)."
            ) from error


def _note(handle: Any, flat: Any) -> None:
    spread = handle.uses_sharded_strategy
    for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
        start, stop = 0, shape.numel()
        if spread:
            start, stop = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
        _PIECES[parameter] = FlatPiece(shape, start, stop, (handle.process_group,) if spread else ())


def is_flat(parameter: Tensor) -> bool:
    """Whether a parameter is a piece of FSDP's first version."""
    return hasattr(parameter, "_is_flat_param") or hasattr(parameter, "_fsdp_flattened")


def flat_piece(parameter: Tensor) -> FlatPiece | None:
    """Where the piece lies, None for one that :func:`find_flat_pieces` has not seen."""
    piece: FlatPiece | None = _PIECES.get(parameter)  # type: ignore[no-untyped-call]
    return piece


def known_piece(parameter: Tensor, name: str) -> FlatPiece:
    """Where the piece lies.

    Raises:
        NotImplementedError: If nobody knows.
    """
    piece = flat_piece(parameter)
    if piece is None:
        raise NotImplementedError(
            f"{name!r} is a piece of FSDP's first version that belongs to no wrapper of the Trainer's model. Use "
            "FSDPStrategy, or ModelParallelStrategy with fully_shard (FSDP2)."
        )
    return piece


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, of which this process may have a piece."""
    piece = flat_piece(parameter)
    return parameter.shape if piece is None else piece.shape
