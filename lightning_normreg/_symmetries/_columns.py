"""What has an exponent of its own: tensors, parts of fused ones, gains with their 1; and their Euler products."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg._symmetries._euler import euler_entries
from lightning_normreg._symmetries._losses import Losses, ProbeError
from lightning_normreg._symmetries._setup import ATTEMPTS, Setup
from lightning_normreg._symmetries._spaces import null_space

LIVE = 1e-9
"""Size of a column, of the largest, from which it counts: what is less does not reach the loss."""


class Column(NamedTuple):
    """What one exponent is for."""

    name: str  # as in Symmetry.exponents
    parameter: str
    part: tuple[int, int, int] | None = None  # dimension, start and length
    with_one: bool = False  # a gain of the form 1 + γ

    def of(self, tensor: Tensor) -> Tensor:
        """Its entries of a tensor, a view."""
        return tensor if self.part is None else tensor.narrow(*self.part)


def columns_of(setup: Setup, name: str) -> list[Column]:
    """A tensor, in thirds where it may be three that are fused; and once more with its 1, where it is a gain."""
    clean, role = setup.names[name]
    shape = setup.shapes[name]
    owner = name.rpartition(".")[0]
    fused = {side for n, s in setup.shapes.items() if n.rpartition(".")[0] == owner for side in _thirds(s)}
    dim = next((d for d, side in enumerate(shape) if side in fused and (len(shape) == 1 or d in _sides(shape))), None)
    if dim is not None:
        size = shape[dim] // 3
        return [
            Column(f"{clean}[{start}:{start + size}]", name, (dim, start, size)) for start in range(0, 3 * size, size)
        ]
    plain = [Column(clean, name)]
    return [*plain, Column(f"1 + {clean}", name, with_one=True)] if role.role == "gamma" else plain


def _sides(shape: torch.Size) -> list[int]:
    return [d for d in (0, 1) if len(shape) == 2 and shape[d] == 3 * shape[1 - d]]


def _thirds(shape: torch.Size) -> list[int]:
    return [shape[d] for d in _sides(shape)]


def euler_products(setup: Setup, index: int, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
    """Of each column the sum over w·∂L/∂w and over its squares, at one generic point at which the loss is finite."""
    names = list(setup.roles)
    for attempt in range(ATTEMPTS):
        point, seed = setup.point(index, attempt)

        def backward(losses: Losses, at: Mapping[str, Tensor] = point) -> tuple[int, list[Tensor | None]]:
            return len(losses.values()), list(losses.gradients([at[name] for name in names]))

        count, found = setup.call.run(point, backward, seed=seed, shrink=setup.limits.shrink)
        if count != 1:
            raise ProbeError("There must be one loss, but `training_step` has several, by manual optimization.")
        gradients = dict(zip(names, found, strict=True))
        entries = [_entries(column, point, gradients) for column in columns]
        sums = torch.tensor([[float(e.sum()), float(e.square().sum())] for e in entries], dtype=torch.float64)
        if bool(sums.isfinite().all()):
            return sums[:, 0], sums[:, 1]
    raise ProbeError(
        f"The loss and its gradient must be finite, but were not at {ATTEMPTS} points close to the weights."
    )


def _entries(column: Column, point: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> Tensor:
    weight = column.of(point[column.parameter])
    gradient = gradients[column.parameter]
    own = None if gradient is None else column.of(gradient.to_dense() if gradient.is_sparse else gradient)
    return euler_entries(weight + 1 if column.with_one else weight, own, torch.float64)


def chosen(
    columns: list[Column], products: Tensor, sizes: Tensor, dtype: torch.dtype
) -> tuple[list[Column], Tensor, Tensor]:
    """Without parts that have the same exponents everywhere, and with gains in the form that has more symmetries."""
    kinds = _kinds(column for column in columns if column.with_one)

    def those(forms: Sequence[bool]) -> list[int]:
        ones = {name for kind, one in zip(kinds, forms, strict=True) if one for name in kind}
        return [i for i, column in enumerate(columns) if column.with_one == (column.parameter in ones)]

    def dimension(forms: Sequence[bool]) -> int:
        return _dimension(products, sizes, those(forms), dtype)

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
    live = sizes > LIVE * sizes.max()
    exponents = torch.zeros(len(columns), int(live.sum()), dtype=torch.float64)
    space = null_space(products[:, live], sizes[live], dtype).basis
    exponents = exponents[:, : space.shape[1]].index_copy_(0, live.nonzero().flatten(), space)
    found: list[Column] = []
    joined: list[list[int]] = []
    for i, column in enumerate(columns):
        last = joined[-1] if joined else []
        fused = (
            column.part is not None and column.part[1] > 0 and (exponents[i] - exponents[last[0]]).abs().max() < 1e-6
        )
        if fused:
            last.append(i)
        else:
            joined.append([i])
            found.append(column)
    found = [_joined(column, [columns[i] for i in group]) for column, group in zip(found, joined, strict=True)]
    own = torch.stack([products[:, group].sum(dim=1) for group in joined], dim=1)
    return found, own, torch.stack([sizes[group].norm() for group in joined])


def _joined(column: Column, group: Sequence[Column]) -> Column:
    if len(group) == 1 or column.part is None:
        return column
    dim, start, size = column.part
    stop, name = start + size * len(group), column.name.partition("[")[0]
    if start == 0 and len(group) == 3:
        return Column(name, column.parameter)
    return Column(f"{name}[{start}:{stop}]", column.parameter, (dim, start, stop - start))


def _kinds(columns: Iterable[Column]) -> list[set[str]]:
    """Names that are the same but for numbers in them."""
    groups: dict[str, set[str]] = {}
    for column in columns:
        groups.setdefault(re.sub(r"\d+", "*", column.parameter), set()).add(column.parameter)
    return list(groups.values())


def _dimension(products: Tensor, sizes: Tensor, places: list[int], dtype: torch.dtype) -> int:
    live = [i for i in places if sizes[i] > LIVE * sizes.max()]
    return int(null_space(products[:, live], sizes[live], dtype).basis.shape[1])
