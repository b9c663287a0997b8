"""What is scale-invariant only jointly has the norm and the rotation of one unit: real optimizers under noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_normreg import functional as F
from tests.random_walk import CASES, FILLING, Case

SHAPES = ((16, 64), (48, 16), (24, 24))
SIZES = (1.0, 3.0, 0.3)
"""Of the gradients' entries in each tensor: no two tensors of a network have the same."""


@dataclass
class SetWalk:
    """Tensors that a case's optimizer moves under gradients across all of them together, which go with 1/norm."""

    case: Case
    norm: float
    sizes: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        starts = [torch.randn(shape, dtype=torch.float64, generator=self.random) for shape in SHAPES]
        whole = math.sqrt(sum(float(x.square().sum()) for x in starts))
        self.weights = [nn.Parameter(x * self.norm / whole) for x in starts]
        options = self.case.settings | self.case.options
        self.optimizer = self.case.make(self.weights, lr=0.0, weight_decay=self.case.weight_decay, **options)
        for _ in range(FILLING):  # the moments fill before the weights move
            self.step()
        self.optimizer.param_groups[0]["lr"] = self.case.lr

    def flat(self) -> Tensor:
        """The concatenation."""
        return torch.cat([w.detach().flatten() for w in self.weights])

    def step(self) -> None:
        """One step under a new gradient."""
        w = self.flat()
        noise = [
            s * torch.randn(shape, dtype=w.dtype, generator=self.random).flatten()
            for s, shape in zip(self.sizes, SHAPES, strict=True)
        ]
        g = torch.cat(noise)
        g = (g - w * (g @ w) / (w @ w)) / w.norm()
        for weight, part in zip(self.weights, torch.split(g, [w.numel() for w in self.weights]), strict=True):
            weight.grad = part.view(weight.shape)
        self.optimizer.step()


def recipe_of(case: Case, sizes: tuple[float, ...]) -> dict[str, object]:
    """The package's settings for all of the set."""
    entries = [math.prod(shape) for shape in SHAPES]
    given = case.recipe()
    if "entries" in given:
        given["entries"] = sum(entries)
    if "gradient_norm" in given:
        given["gradient_norm"] = math.sqrt(sum(s**2 * n for s, n in zip(sizes, entries, strict=True)))
    return given | ({"shape": SHAPES} if "shape" in given else {})


def at_equilibrium(case: Case, sizes: tuple[float, ...], relaxations: float, seed: int) -> tuple[float, float, float]:
    """Norm and rotation over what is predicted, and three standard errors of the first."""
    recipe = recipe_of(case, sizes)
    norm, half_life = (f(case.family, **recipe) for f in (F.equilibrium_norm, F.equilibrium_half_life))
    walk = SetWalk(case, norm, sizes, seed)
    for _ in range(int(3 * half_life)):
        walk.step()
    steps, squares, cosines = int(max(400, relaxations * half_life)), 0.0, 0.0
    for _ in range(steps):
        before = walk.flat()
        walk.step()
        after = walk.flat()
        squares += float(before @ before)
        cosines += float(before @ after / before.norm() / after.norm())
    # As in tests.random_walk, with as many independent numbers as the sizes of the gradients leave.
    weights = torch.cat([torch.full((math.prod(shape),), s**2) for s, shape in zip(sizes, SHAPES, strict=True)])
    many = case.family not in ("sgd", "nesterov") or len(set(sizes)) == 1
    numbers = len(weights) if many else float(weights.sum() ** 2 / weights.square().sum())
    error = math.sqrt(2 / numbers) / 2 / math.sqrt(steps / half_life * math.log(2) / 2)
    turned = math.acos(cosines / steps) / F.equilibrium_rotation(case.family, **recipe)
    return math.sqrt(squares / steps) / norm, turned, 3 * error + 2 / numbers + case.slack


RUNS = [(name, seed) for seed in range(3) for name in ("SGD", "momentum 0.9", "AdamW", "Lion, ηλ = 1e-3")]
RUNS.append(("Muon 16 × 64", 0))  # a minute


@pytest.mark.slow
@pytest.mark.parametrize("name, seed", RUNS)
def test_a_set_is_one_unit(name: str, seed: int) -> None:
    """With gradients of other sizes in each of its tensors."""
    case = CASES[name]
    norm, rotation, tolerance = at_equilibrium(case, SIZES, 12 if case.family == "sgd" else 6, seed)
    assert norm == pytest.approx(1.0, abs=tolerance)
    assert rotation == pytest.approx(1.0, abs=tolerance * (2 if case.family == "sgd" else 1))


@pytest.mark.slow
def test_decay_in_adams_gradient_is_that_of_one_unit_only_for_equal_gradients() -> None:
    """Adam divides decay by the gradients' size, which is another in each tensor: the prediction ends there."""
    case = CASES["Adam + L2"]
    norm, rotation, tolerance = at_equilibrium(case, (1.0, 1.0, 1.0), 4, 0)
    assert (norm, rotation) == pytest.approx((1.0, 1.0), abs=tolerance)
    norm, _, tolerance = at_equilibrium(case, SIZES, 4, 0)
    assert abs(norm - 1) > tolerance


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_rows_of_rare_words_count_less(seed: int) -> None:
    """A row with a gradient in a share p of the steps has p/(p + 1 − β₂) of the mean square update of any other.

    Above 1 − β₂ Adam's second moment makes good that updates are seldom; below, each one comes after it has been
    forgotten. To a quarter, which the mean of ratios is away from the ratio of means, and four standard errors.
    """
    shares = torch.tensor([1.0, 0.1, 0.01, 1e-3], dtype=torch.float64)
    random, columns, steps, beta2 = torch.Generator().manual_seed(seed), 300, 6000, 0.99
    rows = nn.Parameter(torch.zeros(len(shares), columns, dtype=torch.float64))
    optimizer = AdamW([rows], lr=1.0, betas=(0.9, beta2), weight_decay=0.0, eps=1e-30)
    squares, hits = torch.zeros(len(shares), dtype=torch.float64), torch.zeros(len(shares))
    for step in range(steps):
        hit = torch.rand(len(shares), columns, generator=random) < shares.unsqueeze(1)
        rows.grad = torch.randn(rows.shape, generator=random, dtype=torch.float64) * hit
        before = rows.detach().clone()
        optimizer.step()
        if step >= steps // 2:
            squares += (rows.detach() - before).square().mean(dim=1)
            hits += hit.sum(dim=1)
    measured = squares / squares[0]
    expected = shares / (shares + 1 - beta2) * (2 - beta2)
    for m, e, count in zip(measured.tolist(), expected.tolist(), hits.tolist(), strict=True):
        assert m == pytest.approx(e, rel=0.25 + 4 / math.sqrt(count))
