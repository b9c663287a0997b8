"""Layers of one kind taken together, and symmetries of all of them parted into those of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_normreg._symmetries._columns import Column

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_ALONE = 1e-7
"""Sum of Euler products, of what it were if nothing cancelled, up to which a layer counts as having a symmetry alone:
roundoff leaves 1e-14, and what is none is above 1e-3."""


def kind_of(column: Column) -> object:
    """The same for columns that are the same but for numbers in their names."""
    return _NUMBER.sub("*", column.parameter), column.part, column.with_one


def kinds_of(columns: Sequence[Column], shapes: Mapping[str, torch.Size]) -> list[list[int]]:
    """Places of columns that are the same but for numbers in their names."""
    groups: dict[object, list[int]] = {}
    for place, column in enumerate(columns):
        key = kind_of(column), shapes[column.parameter]
        groups.setdefault(key, []).append(place)
    return list(groups.values())


class Layers:
    """What was measured of single columns, for what was found of kinds of them.

    Args:
        columns: The single columns.
        groups: Their places, kind by kind.
        names: Parameter → clean name.
        products: Euler products, shape (points, columns).
        sizes: Typical size of each column, shape (columns,).
    """

    def __init__(
        self,
        columns: Sequence[Column],
        groups: Sequence[Sequence[int]],
        names: Mapping[str, str],
        products: Tensor,
        sizes: Tensor,
    ) -> None:
        self._columns, self._names, self._products, self._sizes = columns, names, products, sizes
        self._kind = {columns[group[0]].parameter: [columns[i].parameter for i in group] for group in groups}

    def members(self, column: Column) -> list[Column]:
        """All columns of a kind, of which the first one is given."""
        own = self._names[column.parameter]
        return [
            column._replace(name=column.name.replace(own, self._names[p]), parameter=p)
            for p in self._kind[column.parameter]
        ]

    def parted(self, exponents: Mapping[Column, int]) -> list[dict[Column, int]]:
        """A symmetry of kinds as one of all their members, or as one of each layer where every layer has it alone."""
        return self._split([(self.members(column), power) for column, power in exponents.items()], 0)

    def _split(self, kinds: list[tuple[list[Column], int]], place: int) -> list[dict[Column, int]]:
        numbers = [{_number(column, place) for column in members} for members, _ in kinds]
        if numbers[0] == {None}:
            return [{column: power for members, power in kinds for column in members}]
        layers = [
            [([c for c in members if _number(c, place) == number], power) for members, power in kinds]
            for number in sorted(numbers[0] - {None})  # type: ignore[type-var]
        ]
        alike = all(found == numbers[0] for found in numbers) and len(layers) > 1
        if alike and all(map(self._is_symmetry, layers)):
            return [part for layer in layers for part in self._split(layer, place + 1)]
        return self._split(kinds, place + 1)

    def _is_symmetry(self, kinds: list[tuple[list[Column], int]]) -> bool:
        total, size = torch.zeros(len(self._products), dtype=torch.float64), 0.0
        for members, power in kinds:
            for column in members:
                own = [i for i, c in enumerate(self._columns) if _covers(column, c)]
                total += power * self._products[:, own].sum(dim=1)
                size += power**2 * float(self._sizes[own].square().sum())
        return bool(total.abs().max() <= _ALONE * size**0.5)


def _number(column: Column, place: int) -> int | None:
    numbers = _NUMBER.findall(column.parameter)
    return int(numbers[place]) if place < len(numbers) else None


def _covers(column: Column, other: Column) -> bool:
    """Whether another column is this one or a part of it."""
    if column.parameter != other.parameter or column.with_one != other.with_one:
        return False
    if column.part is None or other.part is None:
        return column.part is None
    return column.part[1] <= other.part[1] and other.part[1] + other.part[2] <= column.part[1] + column.part[2]
