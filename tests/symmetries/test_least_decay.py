"""What is left of decay is least: of all equivalent recipes, by going through all that come into question."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import find_symmetries, reduce_decay
from lightning_normreg._symmetries._reduce_decay import _COST
from tests.symmetries._small_models import batch_norm, everything, log_loss, matrices
from tests.symmetries._symmetry_case import vectors
from tests.symmetries._symmetry_cases import Attention, Residual, sequences

RATE = 1e-6
"""So small that 1 − r and exp(−r) are the same to six digits."""


def stream() -> tuple[nn.Module, Tensor]:
    """Two branches."""
    return Residual(lambda: nn.LayerNorm(6)), vectors()


def stream_without_shifts() -> tuple[nn.Module, Tensor]:
    """The same behind RMSNorm."""
    return Residual(lambda: nn.RMSNorm(6)), vectors()


def attention() -> tuple[nn.Module, Tensor]:
    """One head behind RMSNorm."""
    return Attention(), sequences()


def extreme(exponents: Tensor, given: Tensor) -> Tensor:
    """Equivalent recipes in which as many rates are 0 as there are symmetries, in rows that fix how far each goes.

    Whatever only falls with further zeros, as a number of tensors does, is least in one of them: while the rows that
    are 0 do not fix how far each symmetry goes, one can go further along some symmetry, they stay 0, and another row
    becomes 0. A sum of p·|r| is least in one of them as well, being linear between them.
    """
    n, d = exponents.shape
    chosen = torch.tensor(list(combinations(range(n), d)))
    rows = exponents[chosen]
    regular = torch.linalg.det(rows).abs() > 0.5  # of integers
    far = torch.linalg.solve(rows[regular], given[chosen[regular]])
    recipes: Tensor = given - far @ exponents.T
    return torch.where(recipes.abs() < 1e-9, 0.0, recipes)


CASES: list[tuple[Callable[[], Any], Callable[..., list[str]], tuple[int, int]]] = [
    # Tensors that it is left on, and the fewest that an equivalent recipe has. With gains alone they are as many; gain
    # and shift are two in place of the one weight that reads them, and a bias that is left is one more.
    (stream, matrices, (8, 5)),
    (stream, everything, (9, 6)),
    (stream_without_shifts, matrices, (5, 5)),
    (stream_without_shifts, everything, (6, 6)),
    (attention, matrices, (2, 2)),
    (attention, everything, (3, 3)),
    (batch_norm, matrices, (2, 1)),
    (batch_norm, everything, (3, 2)),
]


@pytest.mark.parametrize("make, decayed, tensors", CASES)
def test_no_equivalent_recipe_has_less(make: Any, decayed: Any, tensors: tuple[int, int]) -> None:
    """Its cost is least, as promised, and in these cases it is left on as few matrices as can be.

    These are none, or one where no norm is in front of the head. Only the cost is minimized: the number of matrices is
    a finding, and the number of tensors need not be least.
    """
    torch.manual_seed(0)
    model, batch = make()
    symmetries = find_symmetries(model.train(), batch, forward=log_loss)
    names, rates = symmetries.tensors, dict.fromkeys(decayed(model), RATE)
    given = torch.tensor([rates.get(name, 0.0) for name in names], dtype=torch.float64) / RATE
    ours = torch.tensor([reduce_decay(symmetries, rates).rates[name] for name in names], dtype=torch.float64) / RATE
    ours = torch.where(ours.abs() < 1e-5, 0.0, ours)
    all_of_them = extreme(symmetries.matrix(), given)
    cost = torch.tensor([_COST.get(symmetries.roles[name], 1.0) for name in names], dtype=torch.float64)

    heavy = cost == 1
    assert float(cost @ ours.abs()) == pytest.approx(float((all_of_them.abs() @ cost).min()), rel=1e-5)
    assert int(ours[heavy].count_nonzero()) == int(all_of_them[:, heavy].count_nonzero(dim=1).min())
    assert (int(ours.count_nonzero()), int(all_of_them.count_nonzero(dim=1).min())) == tensors
