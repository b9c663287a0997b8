"""Sparse gradients: the numbers of a dense one, without a dense copy of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_normreg._symmetries import Axis, Observed
from lightning_normreg._weights import ParameterRole, Table, Watched, gradient_of
from lightning_normreg._weights._watched import Part

ROLE = ParameterRole("embedding", "", "")
UNITS = {
    "rows": (Part("neuron"),),
    "columns": (Part("neuron", 1),),
    "blocks of rows": (Part(2),),
    "blocks of columns": (Part(2, 1),),
    "whole": (Part("layer"),),
    "some rows": (Part("neuron", 0, 1, 2, 7), Part("layer", 0, 1, 8, 12)),
    "some columns": (Part("neuron", 1, 1, 1, 3), Part("layer", 1, 1, 4, 6)),
}


def table(rows: int = 12, columns: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    """A weight with an uncoalesced sparse gradient: what several backward passes leave, rows repeated."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype))
    for indices in ([1, 1, 9, 6], [6, 11, 1]):
        picked = torch.tensor(indices).remainder(rows)
        out = nn.functional.embedding(picked, weight, sparse=True)
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.is_coalesced()
    return weight


def units_of(parts: tuple[Part, ...], array: np.ndarray) -> list[np.ndarray]:
    """Entries of each unit, in the order of the table."""
    found = []
    for part in parts:
        turned = array if part.dim == 0 else array.T
        start, stop = part.slices(torch.Size(array.shape))
        size = part.size(torch.Size(array.shape))
        found += [turned[at : at + size].ravel() for at in range(start, stop, size)]
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", UNITS)
def test_gradients_are_measured_as_if_they_were_dense(unit: str, dtype: torch.dtype, seed: int) -> None:
    """Norms and cosines of each unit and the norm of the tensor: sums of at most 72 terms, so within 100 roundings."""
    weight, dense = table(dtype=dtype, seed=seed), nn.Parameter(torch.randn(4, 3, dtype=dtype))
    dense.grad = torch.randn(4, 3, dtype=dtype)
    other = Watched("dense", dense, ROLE, (Part("neuron"),))
    found = Table([Watched("sparse", weight, ROLE, UNITS[unit]), other])
    assert weight.grad is not None
    w, g = weight.detach().double().numpy(), weight.grad.to_dense().double().numpy()
    pairs = list(zip(units_of(UNITS[unit], w), units_of(UNITS[unit], g), strict=True))
    pairs += list(zip(dense.detach().double().numpy(), dense.grad.double().numpy(), strict=True))
    norms = np.array([np.linalg.norm(b) for _, b in pairs])
    cosines = np.array([abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b) or 1) for a, b in pairs])
    tolerance = 100 * torch.finfo(dtype).eps
    measured = found.norms_of(found.squares(gradient_of))
    assert measured.units.numpy() == pytest.approx(norms, rel=tolerance)
    assert measured.tensors[0].item() == pytest.approx(np.linalg.norm(g), rel=tolerance)
    sums = found.gradients()
    lengths = found.lengths_of(sums)
    assert lengths.cosine().numpy() == pytest.approx(cosines, rel=tolerance, abs=tolerance)
    assert lengths.norm.numpy() == pytest.approx([np.linalg.norm(a) for a, _ in pairs], rel=tolerance)
    assert lengths.update().numpy() == pytest.approx(norms, rel=tolerance)
    reached = found.reached()
    assert reached is not None
    assert reached.tolist() == [norm > 0 or number >= len(pairs) - 4 for number, norm in enumerate(norms)]


def test_a_gradient_that_is_sparse_in_all_dimensions() -> None:
    """As that of ``gather(sparse_grad=True)``; and one without any entry."""
    weight = nn.Parameter(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))
    places = torch.tensor([[0, 3, 3, 0, 1, 2], [5, 3, 3, 0, 1, 2]])
    weight.gather(0, places, sparse_grad=True).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.sparse_dim() == 2
    found = Table([Watched("w", weight, ROLE, (Part("neuron"),))])
    norms = weight.grad.to_dense().double().norm(dim=1)
    assert found.squares(gradient_of)[0, :12].sqrt() == pytest.approx(norms, rel=100 * torch.finfo(torch.float32).eps)
    weight.grad = None
    nn.functional.embedding(torch.zeros(0, dtype=torch.long), weight, sparse=True).sum().backward()
    for parts in UNITS.values():
        found = Table([Watched("w", weight, ROLE, parts)])
        assert not found.squares(gradient_of).any()
        assert not found.lengths_of(found.gradients()).update().any()


def test_what_observer_and_watchdog_sum() -> None:
    """The sums ``Σ w·g`` and their squares, along rows and columns, are those of the dense gradient."""
    weight, looked_at = table(), [Axis(0), Axis(1)]
    seen = Observed.of(weight.detach(), gradient_of(weight), looked_at)
    assert weight.grad is not None
    entries = weight.detach().double() * weight.grad.to_dense().double()
    assert seen.gradient.item() == pytest.approx(weight.grad.to_dense().double().norm().item(), rel=1e-5)
    for axis in looked_at:
        other = 1 - axis.dim
        # Sums of at most 12 terms in float32.
        error = 12 * torch.finfo(torch.float32).eps * entries.abs().sum(other)
        assert ((seen.tables[axis].sums - entries.sum(other)).abs() <= error).all()
        assert seen.tables[axis].squares.double() == pytest.approx(entries.square().sum(other), rel=1e-5)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that is made or read whole by an operation that makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        inside = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if is_strided(t)}
        made = [t for t in tree_leaves(out) if is_strided(t) and t.untyped_storage().data_ptr() not in inside]
        self.entries = max([self.entries, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
        return out


def is_strided(value: object) -> bool:
    """Whether it is a tensor with memory of its own."""
    return isinstance(value, Tensor) and value.layout == torch.strided


@pytest.mark.parametrize("unit", ["rows", "whole"])  # norms of columns of the weight itself take a copy of that
def test_no_dense_copy_of_a_gradient_is_made(unit: str) -> None:
    """With 40 000 rows of 16 entries of which four are reached, nothing is larger than a number for each row."""
    rows, columns = 40_000, 16
    weight = table(rows, columns)
    found = Table([Watched("w", weight, ROLE, UNITS[unit])])
    found.squares()  # makes what is kept
    with torch.no_grad(), Largest() as largest:
        found.squares(gradient_of)
        found.gradients()
        found.reached()
        Observed.of(weight.detach(), gradient_of(weight), [Axis(0), Axis(1)])
    sums_of_rows = 5 * (rows + 4) * 2  # five sums of each reached row and of the rest of each, of units and tensors
    assert largest.entries <= max(sums_of_rows, 2**18)
    assert largest.entries < rows * columns
