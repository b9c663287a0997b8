"""The space of scaling symmetries as linear algebra: from Euler products to integer exponents that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_normreg._symmetries._thresholds import THRESHOLDS as THRESHOLDS
from lightning_normreg._symmetries._thresholds import Thresholds

SymmetryKind = Literal["unit", "set", "pair", "rest"]
_LARGEST = 6
"""Largest exponent that is looked for; 2 is met (a gain in front of both q and k), and 3 in products of three."""
_PIVOT = 1e-3
"""Entry of orthonormal vectors from which on it is none of roundoff."""
_DENOMINATORS = torch.arange(1, _LARGEST + 1, dtype=torch.float64)


class NullSpace(NamedTuple):
    """Exponents that leave the loss alone."""

    basis: Tensor  # orthonormal columns, shape (tensors, dimension)
    smallest: float  # smallest singular value that does not count as zero, of the largest
    largest: float  # largest one that does


def null_space(products: Tensor, sizes: Tensor, limits: Thresholds) -> NullSpace:
    r"""Exponents c with :math:`\sum_i c_i E_{ki} = 0` at every point k.

    A loss with L(a^c w) = L(w) for all a > 0 has it, by the derivative along the orbit, and the other way round.

    Args:
        products: Euler products :math:`E_{ki}=\langle w_i, \partial L/\partial w_i\rangle`, shape (points, tensors).
        sizes: Typical size of each column if nothing cancelled, shape (tensors,).
        limits: What counts as zero.

    Examples:
        >>> products = torch.tensor([[1.0, -2.0], [3.0, -6.0], [2.0, -4.0]]).double()
        >>> space = null_space(products, torch.ones(2).double(), THRESHOLDS[torch.float64])
        >>> (space.basis / space.basis[1]).round(decimals=6)
        tensor([[2.],
                [1.]], dtype=torch.float64)
    """
    values, vectors = _decomposed(products, sizes)
    rank = int((values > limits.null).sum())
    null = (vectors[rank:] / sizes).T
    basis, _ = torch.linalg.qr(null / null.norm(dim=0).clamp_min(1e-300))
    smallest = float(values[rank - 1]) if rank else 1.0
    return NullSpace(basis, smallest, float(values[rank]) if rank < len(values) else 0.0)


def _decomposed(products: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    rows = products / sizes
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=True)
    return torch.nn.functional.pad(values, (0, rows.shape[1] - len(values))) / values[:1].clamp_min(1e-300), vectors


def dimension_of(products: Tensor, sizes: Tensor, limits: Thresholds) -> int:
    """Of the space that :func:`null_space` finds."""
    return int((_decomposed(products, sizes)[0] <= limits.null).sum())


def rational(basis: Tensor, limits: Thresholds) -> Tensor:
    """The same space without roundoff, orthonormal: its echelon form has fractions of small numbers.

    Raises:
        ArithmeticError: If it has not.
    """
    rows = _echelon(basis)
    multiples = rows.unsqueeze(-1) * _DENOMINATORS
    off = (multiples - multiples.round()).abs() / _DENOMINATORS
    close = off <= limits.fraction
    if not bool(close.any(dim=-1).all()):
        raise ArithmeticError(f"an exponent is {float(off.amin(dim=-1).max()):.1g} away from a fraction")
    first = close.to(torch.uint8).argmax(dim=-1, keepdim=True)
    exact = (multiples.round() / _DENOMINATORS).gather(-1, first).squeeze(-1)
    orthonormal: Tensor = torch.linalg.qr(exact.T)[0]
    return orthonormal


def readable_basis(basis: Tensor, kinds: Sequence[object]) -> list[tuple[SymmetryKind, Tensor]]:
    """Integer exponents that span the same space: units, then sets, then pairs, then the rest.

    A unit is one tensor. A set has no negative exponent; of two tensors that may stand for each other (v and o) it has
    the later one. Vectors of few tensors are taken first, so that {embedding, v, down} is left out where v/o is a pair
    and {embedding, o, down} a set. Where linear programming finds too few, rows in echelon form are added.

    Args:
        basis: Any basis, as columns, of tensors in the order in which they are used.
        kinds: Of each tensor; those of one kind get the same exponent where there is a choice.

    Raises:
        ArithmeticError: If the space has no basis of small integers.
    """
    tensors, dimension = basis.shape
    alone = [i for i in range(tensors) if float(basis[i].square().sum()) > 1 - 1e-9]
    found: list[tuple[SymmetryKind, Tensor]] = [("unit", _one(tensors, i)) for i in alone]
    rest = basis.clone()
    rest[alone] = 0.0
    left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    space = left[:, values > 1e-9]
    exact = [*_twos(space), *_sparsest(space, mixed=False, largest=1), *_sparsest(space, mixed=True, largest=1)]
    more = (_sparsest(space, mixed=mixed, largest=_LARGEST) for mixed in (False, True))
    rows = (vector for row in _echelon(space) for vector in _integer(row))
    for candidates in (exact, *more, rows):
        for vector in sorted(candidates, key=lambda vector: _length(vector, kinds)):
            if len(found) < dimension and is_new(vector, [v for _, v in found]):
                found.append((_kind(vector), vector))
        if len(found) == dimension:
            break
    else:
        raise ArithmeticError(f"of {dimension} symmetries only {len(found)} have small integer exponents")
    names = get_args(SymmetryKind)
    return sorted(
        found, key=lambda pair: (names.index(pair[0]), int(pair[1].count_nonzero()), int(pair[1].nonzero()[0]))
    )


def _length(vector: Tensor, kinds: Sequence[object]) -> tuple[int, ...]:
    """What makes exponents hard to read: large ones, many, of many kinds; tensors that lie apart in a pair; early ones.

    Of a pair and a set of equal length the pair is taken, of which several sets may be made.
    """
    places = vector.nonzero().flatten()
    is_set = not bool((vector < 0).any())
    alike = len({(kinds[i], int(vector[i])) for i in places.tolist()})
    apart = 0 if is_set else int(places[-1] - places[0])
    return int(vector.abs().max()), len(places), int(is_set), int(vector.abs().sum()), alike, apart, -int(places.sum())


def _kind(vector: Tensor) -> SymmetryKind:
    if not bool((vector < 0).any()):
        return "set"
    return "pair" if set(vector[vector != 0].tolist()) <= {-1, 1} else "rest"


def _one(tensors: int, place: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(place), tensors)


def is_new(vector: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether a vector is none of the space that others span."""
    matrix = torch.stack([*others, vector]).double()
    return int(torch.linalg.matrix_rank(matrix)) == len(matrix)


def _twos(space: Tensor) -> Iterator[Tensor]:
    """All exponents of two tensors."""
    off = torch.eye(len(space), dtype=space.dtype) - space @ space.T
    own = off.diagonal()
    for i, j in (own > 1e-9).logical_and(own.unsqueeze(1) > 1e-9).triu(1).nonzero().tolist():
        ratio = -float(off[i, j] / off[j, j])
        # The squared distance of e_i + ratio·e_j from the space.
        if float(off[i, i] + ratio * off[i, j]) < 1e-12:
            yield from _integer(_one(len(space), i) + ratio * _one(len(space), j))


def _sparsest(space: Tensor, *, mixed: bool, largest: int) -> Iterator[Tensor]:
    """For each tensor the exponents of least sum in which it has exponent 1: all at least 0, or of any sign.

    Of equals later tensors are taken into sets, as the output of attention instead of its values, and into mixed ones
    those that are used next, as the tensors that read a gain.
    """
    from scipy.optimize import linprog  # noqa: PLC0415  it takes half a second to import

    n, d = space.shape
    order = torch.arange(n)
    for i in range(n) if d else ():
        if float(space[i].abs().max()) < 1e-9:
            continue
        far = torch.where(order < i, n + i - order, order - i) if mixed else n - order
        cost = (1 + 1e-3 * far / n).tolist()
        # c = space · y = plus − minus
        blocks = [space, -torch.eye(n).double(), *([torch.eye(n).double()] if mixed else [])]
        equal = torch.cat(blocks, dim=1)
        own = torch.nn.functional.pad(space[i], (0, equal.shape[1] - d)).unsqueeze(0)
        solved = linprog(
            [0.0] * d + cost * (2 if mixed else 1),
            A_eq=torch.cat([equal, own]).numpy(),
            b_eq=[0.0] * n + [1.0],
            bounds=[(None, None)] * d + [(0, largest)] * (equal.shape[1] - d),
            method="highs",
        )
        if solved.status == 0:
            yield from _integer(space @ torch.from_numpy(solved.x[:d]))


def _echelon(space: Tensor) -> Tensor:
    """The rows of the reduced echelon form, which only the space decides."""
    rows, place = space.T.clone(), 0
    for column in range(rows.shape[1]):
        if place == len(rows):
            break
        pivot = place + int(rows[place:, column].abs().argmax())
        if abs(float(rows[pivot, column])) < _PIVOT:
            continue
        rows[[place, pivot]] = rows[[pivot, place]]
        rows[place] /= rows[place, column].clone()
        others = torch.arange(len(rows)) != place
        rows[others] -= rows[others, column : column + 1] * rows[place]
        place += 1
    return rows


def _integer(vector: Tensor) -> Iterator[Tensor]:
    """The smallest multiple that has integers only, the first positive; nothing if it has a large one."""
    largest = float(vector.abs().max())
    for multiple in range(1, _LARGEST + 1):
        scaled = vector * multiple
        rounded = scaled.round()
        if float((scaled - rounded).abs().max()) < 1e-5 and largest * multiple < _LARGEST + 0.5:
            whole: Tensor = rounded.long()
            yield whole * int(whole[whole != 0][0].sign())
            return
