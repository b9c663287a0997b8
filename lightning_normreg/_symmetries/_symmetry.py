"""What was found of the scaling symmetries of a loss, in plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normreg._symmetries._spaces import SymmetryKind
from lightning_normreg._weights import listed


@dataclass(frozen=True)
class Symmetry:
    """Exponents c such that multiplying each tensor by a^c leaves the loss alone, for every a > 0.

    Attributes:
        kind: ``"unit"``: one tensor alone (whose neurons may be units by themselves, see
            :func:`find_scale_invariance`). ``"set"``: several tensors, scale-invariant together. ``"pair"``: exponents
            1 and −1. ``"rest"``: others.
        exponents: Clean name, or ``name[start:stop]`` for a part of a fused tensor → exponent. ``1 + name`` is a gain
            of that form, which is multiplied together with its 1.
    """

    kind: SymmetryKind
    exponents: Mapping[str, int]

    def __str__(self) -> str:
        """One sentence.

        >>> print(Symmetry("pair", {"q": 1, "k": -1}))
        Multiplying q by a and k by 1/a changes nothing.
        """
        powers: dict[int, list[str]] = {}
        for name, power in self.exponents.items():
            powers.setdefault(power, []).append(name)
        if self.kind == "unit":
            return f"{next(iter(self.exponents))} is scale-invariant."
        if set(powers) == {1}:
            return f"{listed(powers[1], 6)} are scale-invariant together."
        named = [f"{listed(names, 4)} by {_power(power)}" for power, names in powers.items()]
        return f"Multiplying {', '.join(named[:-1])} and {named[-1]} changes nothing."


def _power(power: int) -> str:
    return {1: "a", -1: "1/a"}.get(power, f"a^{power}")


@dataclass(frozen=True)
class Symmetries:
    """All scaling symmetries of a loss, in a basis that can be read.

    Attributes:
        basis: The symmetries: units, sets, pairs, rest.
        tensors: Names of all that reaches the loss, parts of fused tensors apart, in order.
        roles: What each of them is, see :func:`parameter_roles`.
        inert: Those that do not reach the loss, and may be anything.
        smallest: Smallest singular value of the Euler products that does not count as zero, of the largest.
        largest: Largest one that does. A wide gap says that none was missed and none is false.
        certificate: Largest relative change of the loss when all are multiplied by powers of two at once.
        passes: Forward and backward passes that it took.
    """

    basis: tuple[Symmetry, ...]
    tensors: tuple[str, ...]
    roles: Mapping[str, str]
    inert: tuple[str, ...]
    smallest: float
    largest: float
    certificate: float
    passes: int

    def matrix(self) -> Tensor:
        """The exponents, shape (tensors, symmetries), those of ``tensors`` by the symmetries of ``basis``."""
        columns = [[float(s.exponents.get(name, 0)) for name in self.tensors] for s in self.basis]
        return torch.tensor(columns, dtype=torch.float64).reshape(len(columns), len(self.tensors)).T
