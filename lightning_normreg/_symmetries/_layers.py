"""Layers of one kind taken together, and symmetries of all of them parted into those of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_normreg._symmetries._columns import Column, Measured
from lightning_normreg._symmetries._spaces import SymmetryKind, is_new, null_space, rational, readable_basis
from lightning_normreg._symmetries._thresholds import Thresholds

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
LayersType = Literal["auto", "apart", "together"]
MOST = 46
"""Points above which layers are taken together: with the five other passes and nine for the units there are 60."""
MARGIN = 12
"""Points beyond the number of columns: that a tensor looks like a symmetry by accident has no chance then."""
_BETWEEN = 4
"""The same for neighbouring layers, where less is asked anew."""


def kind_of(column: Column) -> object:
    """The same for columns that are the same but for numbers in their names."""
    return in_all_layers(column.parameter), column.part, column.with_one


def in_all_layers(name: str) -> str:
    """A name without the numbers in it."""
    return _NUMBER.sub("*", name)


def plan_of(
    columns: Sequence[Column], shapes: Mapping[str, torch.Size], layers: LayersType
) -> tuple[list[list[int]], int]:
    """Places of the columns that are taken together, and how many points that needs.

    Of deep models all that is the same but for the first number in its name; where that is too much still, but for all
    numbers. There are to be enough points for two neighbouring layers, too.
    """
    if layers == "apart" or (layers == "auto" and len(columns) + MARGIN <= MOST):
        return [[place] for place, _ in enumerate(columns)], len(columns) + MARGIN
    groups = _alike(columns, shapes, 1)
    if len(groups) + MARGIN > MOST:
        groups = _alike(columns, shapes, 0)
    widest = max((len(w) for w in windows_of([c for c in columns if not c.with_one])), default=0)
    wanted = [len(groups) + MARGIN, widest + _BETWEEN]
    return groups, max(points for points in wanted if points <= MOST or points == wanted[0])


def _alike(columns: Sequence[Column], shapes: Mapping[str, torch.Size], numbers: int) -> list[list[int]]:
    """Places of columns that are the same but for so many numbers in their names (0: all)."""
    groups: dict[object, list[int]] = {}
    for place, c in enumerate(columns):
        key = _NUMBER.sub("*", c.parameter, count=numbers), c.part, c.with_one, shapes[c.parameter]
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def windows_of(columns: Sequence[Column]) -> list[list[int]]:
    """Places of what is in two neighbouring layers, or in none: for each layer and the next one, if there is one."""
    layers: dict[str, dict[int, list[int]]] = {}
    outside = []
    for place, column in enumerate(columns):
        number = _NUMBER.search(column.parameter)
        if number is None:
            outside.append(place)
        else:
            layers.setdefault(column.parameter[: number.start()], {}).setdefault(int(number.group()), []).append(place)
    found = []
    for numbers in layers.values():
        ordered = [numbers[n] for n in sorted(numbers)]
        found += [sorted([*outside, *a, *b]) for a, b in zip(ordered, [*ordered[1:], []], strict=True)]
    return found


class Layers:
    """What was measured of single columns, for what was found of kinds of them.

    Args:
        columns: The single columns.
        groups: Their places, kind by kind.
        names: Parameter → clean name.
        measured: Euler products.
        limits: What counts as zero.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        groups: Sequence[Sequence[int]],
        names: Mapping[str, str],
        measured: Measured,
        limits: Thresholds,
    ) -> None:
        self._names, self._measured, self._limits = names, measured, limits
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

    def between(
        self, columns: Sequence[Column], found: Sequence[Mapping[Column, int]]
    ) -> list[tuple[SymmetryKind, dict[Column, int]]]:
        """What is missing in ``found``: symmetries of two neighbouring layers and what belongs to no layer.

        Such as each layer of a plain chain has with the next one, which sums over all layers do not show.
        """
        places = {column: place for place, column in enumerate(columns)}
        known = [_vector(exponents, places) for exponents in found]
        products, sizes = self._measured.of(columns)
        more: list[tuple[SymmetryKind, dict[Column, int]]] = []
        for window in windows_of(columns):
            inside = torch.zeros(len(columns), dtype=torch.bool)
            inside[window] = True
            here = sum(1 for vector in known if not bool(vector[~inside].any()))
            if len(window) + _BETWEEN > len(products):
                continue
            space = null_space(products[:, window], sizes[window], self._limits)
            if space.basis.shape[1] <= here:
                continue
            for kind, vector in readable_basis(
                rational(space.basis, self._limits), [kind_of(columns[i]) for i in window]
            ):
                exponents = {columns[window[i]]: int(e) for i, e in enumerate(vector.tolist()) if e}
                whole = _vector(exponents, places)
                if is_new(whole, known):
                    known.append(whole)
                    more.append((kind, exponents))
        return more

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
        powers = {column: power for members, power in kinds for column in members}
        products, sizes = self._measured.of([*powers])
        exponents = torch.tensor([*powers.values()], dtype=torch.float64)
        return bool((products @ exponents).abs().max() <= self._limits.z * (sizes * exponents).norm())


def _vector(exponents: Mapping[Column, int], places: Mapping[Column, int]) -> Tensor:
    vector = torch.zeros(len(places), dtype=torch.long)
    vector[[places[column] for column in exponents]] = torch.tensor([*exponents.values()])
    return vector


def _number(column: Column, place: int) -> int | None:
    numbers = _NUMBER.findall(column.parameter)
    return int(numbers[place]) if place < len(numbers) else None
