"""What has an exponent of its own: tensors, parts of fused ones, gains with their 1; and their Euler products."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg._symmetries._classify import classify
from lightning_normreg._symmetries._euler import Draw, EulerSums
from lightning_normreg._symmetries._setup import Setup
from lightning_normreg._symmetries._slices import Axis, Table
from lightning_normreg._symmetries._spaces import dimension_of, null_space, rational
from lightning_normreg._symmetries._thresholds import Thresholds


class Column(NamedTuple):
    """What one exponent is for."""

    name: str  # as in Symmetry.exponents
    parameter: str
    part: tuple[int, int, int] | None = None  # dimension, start and length
    with_one: bool = False  # a gain of the form 1 + γ


class Measured:
    """Euler products of all points, for whatever columns are made of them."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        self._sums: dict[tuple[str, bool], EulerSums] = {}
        for one, found in ((False, [d.sums for d in draws]), (True, [d.ones for d in draws])):
            self._sums |= {(name, one): EulerSums.stack([sums[name] for sums in found]) for name in found[0]}

    def whole(self, parameter: str) -> EulerSums:
        """Sums of a parameter, stacked over the points."""
        return self._sums[parameter, False]

    def along(self, column: Column) -> dict[Axis, Table]:
        """Axis → its slices, shape (points, slices), for each axis along which those of the column can be told."""
        tables = self._sums[column.parameter, column.with_one].tables
        if column.part is None:
            return dict(tables)
        dim, start, size = column.part
        return {a: Table(*(v.narrow(1, start, size) for v in table)) for a, table in tables.items() if a == Axis(dim)}

    def of(self, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
        """Euler products, shape (points, columns), and the typical size of each if nothing cancelled."""
        tables = [next(iter(self.along(column).values())) for column in columns]
        products = torch.stack([table.sums.double().sum(dim=1) for table in tables], dim=1)
        squares = torch.stack([table.squares.double().sum(dim=1) for table in tables], dim=1)
        return products, squares.mean(dim=0).sqrt()


def gains_of(setup: Setup) -> list[str]:
    """Parameters that may be gains of the form 1 + γ."""
    return [name for name, role in setup.roles.items() if role.role == "gamma"]


def columns_of(setup: Setup, measured: Measured, order: Sequence[str]) -> list[Column]:
    """Each tensor, in parts where it is several that are fused; and once more with its 1, where it is a gain."""
    seams: dict[str, tuple[int, list[int]]] = {}
    for name, found in _seams(setup, measured):
        # A bias is fused as its weight is.
        same = _beside(setup, name, setup.shapes[name][found[0]])
        seams |= {name: found, **dict.fromkeys(same, (0, found[1]))}
    columns = []
    for name in order:
        clean, role = setup.names[name]
        if name in seams:
            dim, places = seams[name]
            ends = [0, *places, setup.shapes[name][dim]]
            columns += [Column(f"{clean}[{':,' * dim}{a}:{b}]", name, (dim, a, b - a)) for a, b in pairwise(ends)]
            continue
        columns.append(Column(clean, name))
        if role.role == "gamma":
            columns.append(Column(f"1 + {clean}", name, with_one=True))
    return columns


def _beside(setup: Setup, name: str, length: int) -> list[str]:
    """Vectors of that length in the module of a parameter."""
    owner = name.rpartition(".")[0]
    return [n for n, shape in setup.shapes.items() if n.rpartition(".")[0] == owner and shape == (length,)]


_PARTS = 4
"""More than so many are no fused tensor."""


def _seams(setup: Setup, measured: Measured) -> Iterator[tuple[str, tuple[int, list[int]]]]:
    """Where matrices are fused of several: dimension and places of the cuts.

    A part is scale-invariant by itself; or its Euler products are those of another tensor, as of values and the output
    of attention, up and down of a gated layer; or two parts have the same, as queries and keys.
    """
    names = [*setup.roles]
    totals, _ = measured.of([Column(name, name) for name in names])
    for name, shape in setup.shapes.items():
        if len(shape) != 2:
            continue
        others = totals[:, [place for place, other in enumerate(names) if other != name]]
        for axis, own in measured.whole(name).tables.items():
            biases = [measured.whole(b) for b in _beside(setup, name, own.sums.shape[1])]
            units = classify(EulerSums({axis: own}, own.squares.sum(1), is_vector=False), {}, setup.limits)
            places = sorted({p for pair in units.slices or () for p in pair} - {0, shape[axis.dim]})
            for table in () if units.has_units else (own, *(own.plus(b.tables[Axis(0)]) for b in biases[:1])):
                places = places or _cuts(table, others, setup.limits.z)
            if 0 < len(places) < _PARTS:
                yield name, (axis.dim, places)
                break


def _cuts(table: Table, others: Tensor, tol: float) -> list[int]:
    """Places at which the sum of all slices before or behind is that of another tensor, or half of the sum before.

    ``others`` has a column for each other tensor.
    """
    prefix = torch.nn.functional.pad(table.sums.double().cumsum(dim=1), (1, 0))
    total, n = prefix[:, -1:], table.sums.shape[1]
    small = tol * table.squares.double().sum(dim=1, keepdim=True).sqrt()

    def zeros(values: Tensor) -> list[int]:
        found: list[int] = (values.abs() <= small).all(dim=0).nonzero().flatten().tolist()
        return [] if {0, n} & {*found} else found  # next to neurons without a gradient

    for values in (total - prefix, prefix):
        # In one point first, as most tensors have nothing to do with each other.
        near = ((values[0, :, None] - others[0]).abs() <= small[0]).any(dim=0) & (others.abs() > small).any(dim=0)
        for other in others[:, near].T:
            end = next(iter(zeros(values - other[:, None])), 0)
            if end:
                return [*zeros((2 * prefix - prefix[:, end : end + 1])[:, :end])[:1], end]
    return zeros(2 * prefix - total)[:1]


def chosen(
    columns: list[Column], products: Tensor, sizes: Tensor, limits: Thresholds
) -> tuple[list[Column], Tensor, Tensor]:
    """Without parts that have the same exponents everywhere, and with gains in the form that has more symmetries."""
    kinds = _kinds(column for column in columns if column.with_one)

    def those(forms: Sequence[bool]) -> list[int]:
        ones = {name for kind, one in zip(kinds, forms, strict=True) if one for name in kind}
        return [i for i, column in enumerate(columns) if column.with_one == (column.parameter in ones)]

    def dimension(forms: Sequence[bool]) -> int:
        places = those(forms)
        live = [i for i in places if sizes[i] > limits.inert * sizes.max()]
        return dimension_of(products[:, live], sizes[live], limits)

    # Layers of one kind have gains of one form, and mostly all of them have: sets may need several to be right at once.
    best = [False] * len(kinds)
    for start in (False, True):
        forms = [start] * len(kinds)
        for k in range(len(kinds)):
            plain, one = ([*forms[:k], form, *forms[k + 1 :]] for form in (False, True))
            forms = one if dimension(one) > dimension(plain) else plain
        best = max(best, forms, key=dimension)
    places = those(best)
    columns, products, sizes = [columns[i] for i in places], products[:, places], sizes[places]
    live = sizes > limits.inert * sizes.max()
    exponents = torch.zeros(len(columns), int(live.sum()), dtype=torch.float64)
    space = rational(null_space(products[:, live], sizes[live], limits).basis, limits)
    exponents = exponents[:, : space.shape[1]].index_copy_(0, live.nonzero().flatten(), space)
    joined: list[list[int]] = []
    for i, column in enumerate(columns):
        first = joined[-1][0] if joined else i
        fused = column.part is not None and column.part[1] > 0
        if fused and torch.allclose(exponents[i], exponents[first], rtol=0, atol=1e-6):
            joined[-1].append(i)
        else:
            joined.append([i])
    own = torch.stack([products[:, group].sum(dim=1) for group in joined], dim=1)
    sizes = torch.stack([sizes[group].norm() for group in joined])
    return [_joined([columns[i] for i in group], columns) for group in joined], own, sizes


def _joined(group: Sequence[Column], columns: Iterable[Column]) -> Column:
    first, last = group[0], group[-1]
    if len(group) == 1 or first.part is None or last.part is None:
        return first
    name = first.name.partition("[")[0]
    if len(group) == sum(column.parameter == first.parameter for column in columns):
        return Column(name, first.parameter)
    stop = last.part[1] + last.part[2]
    return Column(
        f"{name}[{first.part[1]}:{stop}]", first.parameter, (first.part[0], first.part[1], stop - first.part[1])
    )


def _kinds(columns: Iterable[Column]) -> list[set[str]]:
    """Names that are the same but for numbers in them."""
    groups: dict[str, set[str]] = {}
    for column in columns:
        groups.setdefault(re.sub(r"\d+", "*", column.parameter), set()).add(column.parameter)
    return list(groups.values())


def blocks_of(exponents: Mapping[Column, int], measured: Measured, tol: float) -> tuple[int, dict[str, int]]:
    """In how many equal blocks of slices a symmetry holds by itself, and along which dimension of each tensor.

    Queries and keys of each head, a gain and what reads it of each channel, up and down of each neuron. 1 where it
    holds as a whole only.
    """
    whole = _without_parts(exponents)
    tables = [[(a.dim, t) for a, t in measured.along(c).items() if a.groups == 1] for c in whole]
    if not 2 <= len(whole) <= _MOST or not all(tables):
        return 1, {}
    ways: list[tuple[list[int], list[Table]]] = [([], [])]
    for choices in tables:
        ways = [([*dims, d], [*found, t]) for dims, found in ways for d, t in choices]
    best: tuple[int, dict[str, int]] = (1, {})
    for dims, found in ways:
        shortest = min(t.sums.shape[1] for t in found)
        for count in (c for c in range(shortest, best[0], -1) if all(t.sums.shape[1] % c == 0 for t in found)):
            total, squares = torch.zeros(()), torch.zeros(())
            for power, table in zip(whole.values(), found, strict=True):
                sums, own = (v.double().reshape(len(v), count, -1).sum(dim=2) for v in table)
                total, squares = total + power * sums, squares + power**2 * own
            if bool((total.abs() <= tol * (squares + 1e-4 * squares.mean(dim=1, keepdim=True)).sqrt()).all()):
                best = count, {c.name: d for c, d in zip(whole, dims, strict=True)}
                break
    return best


_MOST = 6
"""Tensors of a symmetry of which blocks are looked for: their dimensions are tried in all combinations."""


def _without_parts(exponents: Mapping[Column, int]) -> dict[Column, int]:
    """Parts of one tensor that have the same exponent taken for the whole, where they are all of it."""
    found: dict[Column, int] = {}
    parts: dict[tuple[str, int], list[Column]] = {}
    for column, power in exponents.items():
        if column.part is None:
            found[column] = power
        else:
            parts.setdefault((column.parameter, power), []).append(column)
    for (parameter, power), group in parts.items():
        starts = sorted(c.part[1:] for c in group if c.part is not None)
        covers = len(group) > 1 and all(sum(a) == b[0] for a, b in pairwise(starts))
        found |= {Column(group[0].name.partition("[")[0], parameter): power} if covers else dict.fromkeys(group, power)
    return found
