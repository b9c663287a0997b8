"""Products of norms within pairs that no scaling symmetry changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg._symmetries import Symmetries, Symmetry
from lightning_normreg._weights import ParameterRole, Part, Table, Watched, is_sharded, local, share
from lightning_normreg.steps._subscriber import StepSubscriber

Named = Sequence[tuple[str, Parameter, ParameterRole]]


@dataclass(frozen=True)
class Pair:
    """Two tensors of which one may grow as the other shrinks, with nothing else."""

    name: str  # of both
    first: str
    second: str
    symmetry: Symmetry


def pairs_of(symmetries: Symmetries) -> list[Pair]:
    """The pairs of two whole tensors."""
    found = []
    for symmetry in symmetries.basis:
        names = [*symmetry.exponents]
        if symmetry.kind == "pair" and len(names) == 2 and not any(c in name for name in names for c in "[+"):
            first, second = names
            parts, others = first.split("."), second.split(".")
            same = next((i for i, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), 0)
            found.append(Pair(f"{first}_vs_{'.'.join(others[same:])}", first, second, symmetry))
    return found


class Products(StepSubscriber):
    r"""Products :math:`\sqrt{\sum_b\lVert(A\gamma)_b\rVert^2\lVert(B\gamma)_b\rVert^2}` of pairs before an update.

    b are the blocks, as heads, for each of which the pair may be rescaled by itself, and γ is the gain that both
    tensors read, if there is one. Only pairs whose product no symmetry changes have one.

    Args:
        symmetries: All scaling symmetries.
        named: All parameters.
        is_due: Whether the coming update of an optimizer is measured.
    """

    def __init__(self, symmetries: Symmetries, named: Named, is_due: Callable[[int], bool]) -> None:
        super().__init__()
        self._is_due = is_due
        self._parameters = {name: (p, role) for name, p, role in named}
        matrix, places = symmetries.matrix(), {name: i for i, name in enumerate(symmetries.tensors)}
        self._pairs: list[tuple[Pair, str | None]] = []
        for pair in pairs_of(symmetries):
            gain = self._gain(symmetries, pair)
            powers = torch.zeros(len(places), dtype=matrix.dtype)
            powers[[places[pair.first], places[pair.second]]] = 1.0
            if gain is not None:
                powers[places[gain]] = 2.0
            mine = [self._parameters[name.removeprefix("1 + ")][0] for name in self._names(pair, gain)]
            if not (powers @ matrix).any() and not any(map(is_sharded, mine)):
                self._pairs.append((pair, gain))
        self._tables: dict[int, tuple[list[Pair], Table]] = {}
        self._found: dict[str, Tensor] = {}

    @staticmethod
    def _names(pair: Pair, gain: str | None) -> list[str]:
        return [pair.first, pair.second, *([] if gain is None else [gain])]

    def _gain(self, symmetries: Symmetries, pair: Pair) -> str | None:
        """What multiplies the inputs of both, entry by entry."""
        for symmetry in symmetries.basis:
            signs = [name for name, power in symmetry.exponents.items() if power > 0]
            both = symmetry.exponents.get(pair.first) == symmetry.exponents.get(pair.second) == -1
            if symmetry.kind == "pair" and both and len(signs) == 1 and symmetry.blocks > 1:
                return signs[0]
        return None

    def _table(self, index: int, optimizer: Optimizer) -> tuple[list[Pair], Table] | None:
        if index not in self._tables:
            updated = {p for group in optimizer.param_groups for p in group["params"]}
            pairs = [pair for pair, _ in self._pairs if self._parameters[pair.first][0] in updated]
            if not pairs:
                return None
            both = [self._blocks(name, pair.symmetry) for pair in pairs for name in (pair.first, pair.second)]
            self._tables[index] = pairs, Table(both)
        return self._tables[index]

    def _blocks(self, name: str, symmetry: Symmetry) -> Watched:
        parameter, role = self._parameters[name]
        dim = symmetry.dims.get(name, 0)
        size = parameter.shape[dim] // symmetry.blocks
        return Watched(name, parameter, role, (Part(size if symmetry.blocks > 1 else "layer", dim),))

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Measure, on the device."""
        if not self._is_due(index) or (made := self._table(index, optimizer)) is None:
            return
        pairs, table = made
        gains = {name: gain for pair, gain in self._pairs for name in (pair.first, pair.second)}

        def times_gain(parameter: Parameter) -> Tensor:
            name = next(w.name for w in table.watched if w.parameter is parameter)
            gain = gains[name]
            if gain is None:
                return local(parameter)
            factor = self._parameters[gain.removeprefix("1 + ")][0]
            return local(parameter) * (factor + 1 if gain.startswith("1 + ") else factor)

        (squares,) = share([(table, table.squares(lambda p: times_gain(p).detach(), wholes=False))], everywhere=False)
        columns = table.split(squares[0])
        for number, pair in enumerate(pairs):
            first, second = columns[2 * number : 2 * number + 2]
            self._found[pair.name] = (first * second).sum().sqrt()

    def collect(self) -> dict[str, float]:
        """Read the products back, and forget them."""
        names, values = [*self._found], [*self._found.values()]
        self._found = {}
        return dict(zip(names, torch.stack(values).tolist(), strict=True)) if values else {}
