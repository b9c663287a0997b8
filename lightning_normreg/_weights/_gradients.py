"""Gradients beside the rows of pieces: sparse ones by the rows that they have reached, and never as a dense copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._weights._pieces import Piece, real
from lightning_normreg._weights._plans import Plans
from lightning_normreg._weights._sharding import local
from lightning_normreg.functional._units import unit_rows


def gradient_of(parameter: Parameter) -> Tensor:
    """What this process holds of the gradient of a parameter, zero where there is none.

    A sparse one is never made dense: it comes coalesced, as rows of the first dimension that it has entries in.
    """
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(local(parameter))
    if not gradient.is_sparse:
        return local(gradient)
    gradient = gradient.coalesce()
    if gradient.sparse_dim() == 1:
        return gradient
    (first, *others), values = gradient.indices(), gradient.values()  # of gather(sparse_grad=True)
    reached, at = first.unique(return_inverse=True)
    rows = values.new_zeros(len(reached), *gradient.shape[1:]).index_put((at, *others), values)
    places = reached.unsqueeze(0)
    return torch.sparse_coo_tensor(places, rows, gradient.shape, check_invariants=False, is_coalesced=True)


def is_sparse(parameter: Parameter) -> bool:
    """Whether a parameter's present gradient is sparse."""
    return parameter.grad is not None and parameter.grad.is_sparse


class Beside(NamedTuple):
    """Rows of weights and of their gradients, and the plans for them."""

    starts: list[Tensor]
    ends: list[Tensor]
    plans: Plans
    at: Tensor | None  # for each the number of the row of a piece that it is of; None where they are the pieces' own


def beside(pieces: Sequence[Piece], plans: Plans, gradients: Mapping[Parameter, Tensor]) -> Beside:
    """Rows of the pieces, whose plans are given, and of gradients; of sparse ones those that are reached."""
    pairs = [(piece, gradients[piece.parameter]) for piece in pieces]
    if not any(gradient.is_sparse for _, gradient in pairs):
        return Beside([p.now()[1] for p in pieces], [p.like(gradient) for p, gradient in pairs], plans, None)
    found = [_reached(p, g) if g.is_sparse else (p.now()[1], p.like(g), None) for p, g in pairs]
    numbers = [
        torch.arange(where.start, where.stop, device=start.device) if at is None else at + where.start
        for (start, _, at), where in zip(found, plans.rows, strict=True)
    ]
    starts, ends = [start for start, _, _ in found], [end for _, end, _ in found]
    return Beside(starts, ends, Plans(starts), torch.cat(numbers))


def _reached(piece: Piece, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of a parameter and of its sparse gradient where that has entries, and the numbers of the piece's rows.

    Rows of the piece that are slices of several, or lie across them, come with the reached entries only.
    """
    (view, kept), own = piece.now()[0], real(local(piece.parameter).detach())
    size = view.shape[1] if kept == (0,) else 1  # slices in a row of the piece
    length = view.shape[0] * size
    skipped = int(view.storage_offset() - own.storage_offset())
    first, column = divmod(skipped, own.stride(0)) if skipped else (0, 0)
    slices, entries = gradient.indices()[0], view.numel() // max(1, length)
    mine = (slices >= first) & (slices < first + length)
    at, width = slices[mine], own.numel() // max(1, len(own))
    pair = (own[at], real(gradient.values())[mine])
    start, end = (x.reshape(len(at), width)[:, column : column + entries] for x in pair)
    if kept == (0,):
        return start, end, (at - first) // size
    shape = (len(at), *view.shape[1:])
    return unit_rows(start.reshape(shape), kept), unit_rows(end.reshape(shape), kept), None


def with_rest(rows: Tensor, at: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over what is reached, and beside them those over the rest of each row, which no gradient has reached.

    Args:
        rows: As ``with_radial`` gives them.
        at: The number of the row that each is of.
        whole: Squares of the whole rows.
    """
    rest = (whole - torch.zeros_like(whole).index_add_(0, at, rows[0])).clamp_min(0)
    none = torch.zeros_like(rest)
    places = torch.arange(len(rest), device=at.device)
    return torch.cat([rows, torch.stack([rest, none, none, rest, none])], dim=1), torch.cat([at, places])
