"""Products of norms within pairs that no scaling symmetry changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg._symmetries import Symmetries, Symmetry, whole_name
from lightning_normreg._weights import ParameterRole, is_flat, is_sharded
from lightning_normreg.functional._norms import rescaled_norms
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
    tensors read, if there is one. Only pairs whose product no symmetry changes have one, and none that is sharded.

    Args:
        symmetries: All scaling symmetries.
        named: All parameters.
        is_due: Whether the coming update of an optimizer is measured.
    """

    def __init__(self, symmetries: Symmetries, named: Named, is_due: Callable[[int], bool]) -> None:
        super().__init__()
        self._is_due = is_due
        self._parameters = {name: p for name, p, _ in named if not is_sharded(p) and not is_flat(p)}
        self._pairs = []
        for pair in pairs_of(symmetries):
            gain = _gain(symmetries, pair)
            names = [pair.first, pair.second, *([] if gain is None else [gain[0]])]
            powers = {name: 2 if gain is not None and name == gain[0] else 1 for name in names}
            stays = not any(sum(c.exponents.get(n, 0) * p for n, p in powers.items()) for c in symmetries.basis)
            known = {whole_name(name) for name in names} <= self._parameters.keys()
            if stays and known and (gain is None or all(map(self._fits, names[:2], [gain] * 2))):
                self._pairs.append((pair, gain))
        self._found: dict[str, Tensor] = {}

    def _fits(self, name: str, gain: tuple[str, Symmetry]) -> bool:
        """Whether there is an entry of the gain for each slice of a tensor."""
        dim = gain[1].dims.get(name)
        return dim is not None and self._parameters[name].shape[dim] == self._parameters[whole_name(gain[0])].numel()

    @torch.no_grad()
    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Measure, on the device."""
        if not self._is_due(index):
            return
        updated = {p for group in optimizer.param_groups for p in group["params"]}
        for pair, gain in self._pairs:
            if self._parameters[pair.first] in updated:
                both = [self._norms(name, pair.symmetry, gain) for name in (pair.first, pair.second)]
                self._found[pair.name] = torch.linalg.vector_norm(both[0] * both[1])

    def _norms(self, name: str, pair: Symmetry, gain: tuple[str, Symmetry] | None) -> Tensor:
        """Of each block, with the gain."""
        tensor = self._parameters[name].detach()
        if gain is not None:
            factor = self._parameters[whole_name(gain[0])] + float(gain[0] != whole_name(gain[0]))
            shape = [1] * tensor.ndim
            shape[gain[1].dims[name]] = -1
            tensor = tensor * factor.view(shape)
        return rescaled_norms(tensor.movedim(pair.dims.get(name, 0), 0).reshape(pair.blocks, -1))

    def collect(self) -> dict[str, float]:
        """Read the products back, and forget them."""
        names, values = [*self._found], [*self._found.values()]
        self._found = {}
        return dict(zip(names, torch.stack(values).tolist(), strict=True)) if values else {}


def _gain(symmetries: Symmetries, pair: Pair) -> tuple[str, Symmetry] | None:
    """What multiplies the inputs of both tensors entry by entry: its name, and how they are rescaled against it."""
    for symmetry in symmetries.basis:
        gains = [name for name, power in symmetry.exponents.items() if power > 0]
        both = symmetry.exponents.get(pair.first) == symmetry.exponents.get(pair.second) == -1
        if symmetry.kind == "pair" and both and len(gains) == 1 and symmetry.blocks > 1:
            return gains[0], symmetry
    return None
