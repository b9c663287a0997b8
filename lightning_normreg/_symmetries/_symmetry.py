"""What was found of the scaling symmetries of a loss, in plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_normreg._symmetries._spaces import SymmetryKind
from lightning_normreg._weights import RULED_BY_EPS, listed

FORMAT = "lightning_normreg.symmetries"
VERSION = 1


@dataclass(frozen=True)
class Symmetry:
    r"""Exponents c such that multiplying each tensor by a^c leaves the loss alone, for every a > 0.

    Attributes:
        kind: ``"unit"``: one tensor alone (whose neurons may be units by themselves, see
            :func:`find_scale_invariance`). ``"set"``: several tensors, scale-invariant together. ``"pair"``: exponents
            1 and −1. ``"rest"``: others.
        exponents: Clean name, or ``name[start:stop]`` for a part of a fused tensor → exponent. ``1 + name`` is a gain
            of that form, which is multiplied together with its 1.
        blocks: It holds for each of so many equal blocks of slices by itself, as of each head, channel or neuron.
        dims: Name → the dimension of these slices; a fused tensor of whose parts all take part is named as a whole.
        eps_share: How far from exact it is at the module's own weights and eps: :math:`|\sum_i c_iE_i|` of the Euler
            products, in units of :math:`\sqrt{\sum_i c_i^2\sum w^2g^2}`, of which order it is if there is no symmetry.
            None where there is no gradient.
    """

    kind: SymmetryKind
    exponents: Mapping[str, int]
    blocks: int = 1
    dims: Mapping[str, int] = field(default_factory=dict)
    eps_share: float | None = None

    @property
    def least_factor(self) -> float | None:
        r"""How small a unit or set may be made, as a factor, until its share of eps reaches 10 %; None for others.

        :math:`\sqrt{s/0.1}` with the present share s, as eps counts beside a variance that goes with the square.
        """
        if self.eps_share is None or min(self.exponents.values()) < 1:
            return None
        return math.sqrt(self.eps_share / RULED_BY_EPS)

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
        blocks = f", also in each of {self.blocks} blocks of slices" if self.blocks > 1 else ""
        named = [f"{listed(names, 4)} by {_power(power)}" for power, names in powers.items()]
        return f"Multiplying {', '.join(named[:-1])} and {named[-1]} changes nothing{blocks}."


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

    def check_names(self, names: Iterable[str]) -> None:
        """Raise a ``ValueError`` where they are of another model than one whose parameters have these clean names."""
        unknown = {whole_name(name) for name in (*self.tensors, *self.inert)} - {*names}
        if unknown:
            raise ValueError(
                f"`symmetries` must be those of this model, but it has no {listed(sorted(unknown), 4)}. Write them "
                "with find_symmetries(...).save(path)."
            )

    def save(self, path: str | Path) -> None:
        """Write them to a JSON file; an existing one is replaced."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON or a checkpoint; the reverse is :meth:`load`."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @staticmethod
    def load(source: str | Path | Mapping[str, Any] | Symmetries) -> Symmetries:
        """Read them back.

        Args:
            source: Path of a file by :meth:`save`; the mapping that is in it; or symmetries, which are returned.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no symmetries, of another version, or with missing fields or values that make no
                sense; named with the file.

        Examples:
            >>> found = Symmetries((Symmetry("pair", {"q": 1, "k": -1}),), ("q", "k"), {}, (), 0.1, 1e-16, 0.0, 14)
            >>> Symmetries.load(found.to_dict()) == found
            True
        """
        if isinstance(source, Symmetries):
            return source
        where = "the mapping" if isinstance(source, Mapping) else f"{str(source)!r}"
        try:
            content = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
            if content.get("format") != FORMAT or content.get("version") != VERSION:
                raise ValueError(f"no 'format': {FORMAT!r}, 'version': {VERSION}")
            fields = {name: value for name, value in content.items() if name not in ("format", "version")}
            fields |= {name: tuple(fields[name]) for name in ("tensors", "inert")}
            fields["basis"] = tuple(_read(entry, fields["tensors"]) for entry in fields["basis"])
            return Symmetries(**fields)
        except FileNotFoundError:
            raise FileNotFoundError(f"`symmetries` must be a file of Symmetries.save; there is no {where}.") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"Scaling symmetries must be as Symmetries.save writes them, but {where} is not ({error}). Write it "
                "with find_symmetries(...).save(path)."
            ) from error


def whole_name(name: str) -> str:
    """The parameter that a name in symmetries is of, or of a part of."""
    return name.removeprefix("1 + ").partition("[")[0]


def _read(entry: Mapping[str, Any], tensors: Collection[str]) -> Symmetry:
    symmetry = Symmetry(**entry)
    powers = symmetry.exponents.values()
    if symmetry.kind not in get_args(SymmetryKind) or not powers or not set(symmetry.exponents) <= set(tensors):
        raise ValueError(f"a symmetry of kind {symmetry.kind!r} of {listed([*symmetry.exponents], 4)}")
    if not all(type(power) is int and power for power in powers):
        raise ValueError(f"exponents {[*powers]}")
    return symmetry
