from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_normreg import functional as F
from tests import reference
from tests.functional.test_functional import SEED, close, exact, noise, random

EPS = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """A shape, what its units are, and a seed."""

    shape: tuple[int, ...]
    where: dict[str, Any]
    seed: int

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The case's weight."""
        return random(self.shape, dtype, self.seed)

    def step(self, size: float) -> tuple[Tensor, Tensor]:
        """The weight before and after an update of the relative size."""
        return self.weight(), self.weight() + size * random(self.shape, seed=self.seed + 1)


@st.composite
def draw_case(draw: st.DrawFn) -> Case:
    """Any unit, dimension and number of groups that go together."""
    dim = draw(st.integers(0, 1))
    groups = draw(st.integers(1, 3)) if dim else 1
    shape = (
        groups * draw(st.integers(1, 4)),
        *draw(st.lists(st.integers(1, 4), max_size=2)),
        draw(st.integers(1, 150)),
    )
    unit = draw(st.sampled_from(["neuron", "layer", shape[dim], shape[dim] * groups]))  # or that many neurons
    return Case(shape, {"unit": unit, "dim": dim, "groups": groups}, draw(seeds))


seeds, cases, sizes, positive = st.integers(0, 2**32 - 1), draw_case(), st.floats(1e-4, 10.0), st.floats(1e-6, 1e6)
signed = st.floats(-1e30, 1e30).filter(lambda c: abs(c) > 1e-30)


@given(cases, signed)
def test_norm_is_homogeneous(case: Case, c: float) -> None:
    """‖cW‖ = |c| ‖W‖ for units and for the whole."""
    weight = case.weight()
    rtol = 2 * noise(weight) + EPS  # cW rounds c, and then every entry
    close(exact(F.unit_norms(weight, **case.where)) * abs(c), F.unit_norms(weight * c, **case.where), rtol=rtol)
    close(F.weight_norm(weight).item() * abs(c), F.weight_norm(weight * c), rtol=rtol)


@given(cases)
def test_weight_norm_is_pythagorean(case: Case) -> None:
    """‖W‖² = Σ ‖w_u‖², whatever the units are."""
    squares = exact(F.unit_norms(case.weight(), **case.where)) ** 2
    close(squares.sum(), F.weight_norm(case.weight()).double() ** 2, rtol=4 * noise(case.weight()))


@given(cases, positive, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.complex64]))
def test_projection_is_idempotent_and_keeps_the_direction(case: Case, radius: float, dtype: torch.dtype) -> None:
    """A second projection changes no bit; the first puts units at the radius without turning them."""
    start, weight = case.weight(dtype), case.weight(dtype)
    F.project_(weight, radius, **case.where)
    once = weight.clone()
    after = F.project_(weight, radius, **case.where)
    assert torch.equal(once, weight)
    # Dividing rounds every entry by eps/2 of itself in the accumulator, storing it by as much in the weight's type, and
    # that turns a unit by no more. A unit that was near the radius stays off by rounding and two measurements.
    eps = torch.finfo(dtype).eps
    close(np.full(len(after), radius), after, rtol=eps + 3 * noise(start))
    assert F.rotation(start, weight, **case.where).max() <= 1.1 * eps  # measured to 10% and better


@given(cases, sizes, positive)
def test_rotation_ignores_scale(case: Case, size: float, factor: float) -> None:
    """A positive factor on either side changes no angle, a common one no relative update."""
    before, after = case.step(size)
    # Scaling rounds every entry by eps/2 of itself, which turns a unit by no more; both results are quotients of norms.
    rtol = 4 * noise(before) + 4 * EPS
    expected = exact(F.rotation(before, after, **case.where))
    for scaled in [(before * factor, after), (before, after * factor)]:
        close(expected, F.rotation(*scaled, **case.where), rtol=rtol, atol=EPS)
    # Both sides are rounded by eps/2: relative to the weight's norm, by eps/2 and by at most (1 + expected) eps/2.
    expected = exact(F.relative_update(before, after, **case.where))
    close(expected, F.relative_update(before * factor, after * factor, **case.where), rtol=rtol, atol=EPS)


@given(cases, sizes)
def test_rotation_is_symmetric(case: Case, size: float) -> None:
    """A unit turns back by the angle that it turned."""
    before, after = case.step(size)
    there, back = F.rotation(before, after, **case.where), F.rotation(after, before, **case.where)
    ratio = F.unit_norms(before, **case.where) / F.unit_norms(after, **case.where)
    assume(ratio.min() > 1e-6 and ratio.max() < 1e6)
    # Both are quotients of norms, from which three halves of a significand leave 2^-36 of what is along the unit.
    close(exact(there), back, rtol=4 * noise(before) + 4 * EPS, atol=EPS**1.5)


@given(cases, st.floats(1e-4, 0.5))
def test_decay_alone_does_not_rotate(case: Case, decay: float) -> None:
    """Decay alone, w → (1 − d) w, has the relative update d and the angle 0, to the rounding of the weight."""
    before, after = case.weight(), case.weight() * (1 - decay)
    relative = F.relative_update(before, after, **case.where)
    close(np.full(len(relative), decay), relative, rtol=2 * noise(before) + EPS, atol=EPS)
    assert F.rotation(before, after, **case.where).max() <= EPS / (1 - decay)


@given(seeds, st.floats(1e-3, 1e3), st.sampled_from([1, 2]))
def test_effective_lr_ignores_scale(seed: int, c: float, exponent: int) -> None:
    """SGD's effective rate stays under W → cW, η → c²η; Adam's under W → cW, η → cη."""
    weight, lr = random((4, 9), seed=seed), 0.1
    expected = exact(F.effective_lr(lr, F.unit_norms(weight), exponent))
    # For each p a norm on either side, the entries' rounding and a division on either side; η and c^p once each.
    rtol = exponent * (2 * noise(weight) + 2 * EPS) + 2 * EPS
    close(expected, F.effective_lr(lr * c**exponent, F.unit_norms(weight * c), exponent), rtol=rtol)


@given(seeds, st.floats(1e-3, 1e3))
def test_equal_effective_rates_turn_equally(seed: int, c: float) -> None:
    """On a scale-invariant loss SGD turns W with η and cW with c²η by one angle, and the gradient is perpendicular."""
    weight, inputs = random((3, 5), torch.float64, seed), random((8, 5), torch.float64, seed + 1)

    def turn(start: Tensor, lr: float) -> Tensor:
        parameter = nn.Parameter(start.clone())
        outputs = inputs @ parameter.t()
        ((outputs - outputs.mean(0)) / outputs.std(0)).pow(3).mean().backward()
        # Sums of some ten terms, in which 8 outputs may cancel to a hundredth: 1e-12, with room for worse cases.
        assert F.gradient_alignment(start, parameter.grad).max() < 1e-9
        torch.optim.SGD([parameter], lr=lr).step()
        return F.rotation(start, parameter)

    close(exact(turn(weight, 0.1)), turn(c * weight, 0.1 * c * c), rtol=1e-9)


@given(cases, signed)
def test_alignment_is_a_cosine(case: Case, c: float) -> None:
    """It lies in [0, 1]; it is 1 for any multiple of the weight, and 0 for a perpendicular gradient."""
    weight, other = case.step(1.0)
    alignment = F.gradient_alignment(weight, other, **case.where)
    parallel = F.gradient_alignment(weight * abs(c), weight * c, **case.where)
    assert all(((values >= 0) & (values <= 1)).all() for values in (alignment, parallel))
    close(np.ones(len(parallel)), parallel, rtol=4 * noise(weight))
    pairs, turned = torch.stack([weight, other], dim=-1), torch.stack([-other, weight], dim=-1)  # by a quarter
    perpendicular = F.gradient_alignment(pairs, turned, **case.where)
    close(np.zeros(len(perpendicular)), perpendicular, rtol=0, atol=4 * noise(pairs))


def layouts(weight: Tensor) -> list[Tensor]:
    """The same 4-dimensional weight in several memory layouts, the last a part of a larger tensor full of sevens."""
    others = [weight.permute(order).contiguous().permute(order) for order in [(1, 0, 2, 3), (3, 2, 1, 0)]]
    larger = torch.full((2 * weight.shape[0], *weight.shape[1:-1], weight.shape[-1] + 3), 7.0)
    larger[1::2, ..., 2:-1] = weight
    return [weight.clone(), weight.clone(memory_format=torch.channels_last), *others, larger[1::2, ..., 2:-1]]


@pytest.mark.slow
@given(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 40)), seeds)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("unit", ["neuron", "layer", 1])
def test_memory_layout_does_not_matter(unit: str | int, dim: int, shape: tuple[int, ...], seed: int) -> None:
    """Any layout of either tensor gives the contiguous result, and projection writes through it and nowhere else."""
    where = {"unit": unit, "dim": dim}
    before, after = Case(shape, where, seed).step(0.1)
    rtol = 2 * noise(before)
    for a, b in zip(layouts(before), reversed(layouts(after)), strict=True):
        close(exact(F.unit_norms(before, **where)), F.unit_norms(a, **where), rtol=rtol)
        for function in (F.rotation, F.relative_update):
            close(exact(function(before, after, **where)), function(a, b, **where), rtol=rtol + 2 * EPS)
        aligned = F.gradient_alignment(a, b, **where)
        close(exact(F.gradient_alignment(before, after, **where)), aligned, rtol=0, atol=4 * rtol)
    expected, *others = layouts(before * 9)
    F.project_(expected, **where)
    for view in others:
        F.project_(view, **where)
        torch.testing.assert_close(view, expected, rtol=rtol + 2 * EPS, atol=0)
    assert (view._base == 7).sum() == view._base.numel() - view.numel()


@given(st.integers(1, 30), st.integers(1, 300), seeds)
def test_permuting_rows_permutes_results(rows: int, length: int, seed: int) -> None:
    """A neuron's values depend on no other neuron: bit for bit."""
    before, after = Case((rows, length), {}, seed).step(0.1)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    for function in (F.rotation, F.relative_update, F.gradient_alignment):
        assert torch.equal(function(before, after)[order], function(before[order], after[order]))
    permuted = before[order]
    assert torch.equal(F.project_(before)[order], F.project_(permuted))
    assert torch.equal(before[order], permuted)


SPREADS = {
    "normal": lambda w: w,
    "constant": lambda w: 1 + 3 * w[:, :1].abs().frac().expand_as(w),
    "sparse": lambda w: torch.where((w > 1.6) | (w == w.amax(dim=1, keepdim=True)), w, 0.0),
    "heavy tailed": lambda w: w / (w.roll(1, dims=1).abs() + 1e-3) ** 2,
    "one entry and dust": lambda w: torch.cat([w[:, :1].sign(), 4e-4 * w[:, :1].expand_as(w)[:, 1:]], dim=1),
}
# Promised for float32; the others have as many eps and, where they are narrower, half of their own.
DISTANCES = {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8 + 1e-6, torch.float16: 2**-11 + 1e-6}


@pytest.mark.pitfall(19)
@pytest.mark.parametrize("length", [1, 2, 3, 9, 64, 65, 255, 257, 768, 4608, 50257])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", DISTANCES, ids=str)
def test_projected_rows_stay(dtype: torch.dtype, spread: str, length: int) -> None:
    """Projecting again changes no bit of any row; the true norm is within the promised distance of the radius."""
    for seed in range(SEED, SEED + 3):
        rows = SPREADS[spread](random((max(2, min(1000, 150_000 // length)), length), torch.float64, seed))
        start = (1.7 * rows / rows.norm(dim=1, keepdim=True)).to(dtype)
        for weight in (start.clone(), start.t().contiguous().t()):
            for _ in range(1 + (spread == "one entry and dust")):  # in its sums all roundings agree
                F.project_(weight)
            true = np.sqrt(np.square(exact(weight).astype(np.longdouble)).sum(axis=1))
            assert abs(true - 1).max() <= DISTANCES[dtype]
            once = weight.clone()
            F.project_(weight)
            assert torch.equal(once, weight)


@pytest.mark.parametrize("dtype, off", [("float64", 8e-15), ("float32", 4e-6), ("bfloat16", 0.01), ("float16", 2e-3)])
@pytest.mark.parametrize("length", [9, 768])
def test_rows_that_are_off_are_moved(length: int, dtype: str, off: float) -> None:
    """A row that is farther from the radius than rounding explains comes back to it."""
    rows = random((50, length), torch.float64)
    for side in (1 - off, 1 + off):
        weight = (rows * side / rows.norm(dim=1, keepdim=True)).to(getattr(torch, dtype))
        F.project_(weight)
        assert (weight.double().norm(dim=1) - 1).abs().max() < off / 3


@given(st.sampled_from(list(DISTANCES)), st.integers(1, 300), seeds, st.floats(-46, 37), st.floats(-46, 38))
def test_projection_breaks_nothing(dtype: torch.dtype, length: int, seed: int, size: float, radius: float) -> None:
    """Whatever the scale of the weight and the radius, a row ends at the radius or keeps its bits."""
    largest = torch.finfo(dtype).max
    start = (random((3, length), torch.float64, seed) * 10**size).clamp(-largest, largest).to(dtype)
    for target in (10**radius, torch.full((3,), 10**radius, dtype=torch.float64)):
        weight = start.clone()
        F.project_(weight, target)
        # Entries below the smallest normal number are rounded by eps/2 of that: as much again as the others.
        true = np.linalg.norm(exact(weight) / 10**radius, axis=1)
        there = abs(true - 1) <= 2 * torch.finfo(dtype).eps + 4 * noise(start)
        assert (there | (weight == start).all(dim=1).numpy()).all()


FAR = {  # size of the entries, radius: those that come to it, and those that must stay as they are
    "float32": ([(1e-30, 1), (1, 1e-10), (1, 1e10), (1e30, 1e10)], [(1e-41, 1e-20), (1e-30, 1e10), (1e30, 1e-10)]),
    "float16": ([(1, 1e-3), (1, 6e4), (1e-4, 1), (6e3, 1)], [(1, 1e-10), (1, 1e-5), (1, 1e10)]),
}


@pytest.mark.parametrize("dtype", FAR)
def test_projection_reaches_far(dtype: str) -> None:
    """Rows come to any radius at which the type holds their entries, and stay where it does not hold the quotient."""
    for reached, pairs in zip((True, False), FAR[dtype], strict=True):
        for size, radius in pairs:
            start = (random((4, 100), torch.float64) * size).to(getattr(torch, dtype))
            weight = start.clone()
            F.project_(weight, radius)
            assert reached != torch.equal(start, weight)
            tolerance = torch.finfo(weight.dtype).eps + 3 * noise(start)
            assert not reached or reference.unit_norms(exact(weight)) == pytest.approx([radius] * 4, rel=tolerance)
            assert max(reference.rotation(exact(start), exact(weight))) <= tolerance


@pytest.mark.pitfall(24)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_projection_leaves_rows_without_direction(bad: float) -> None:
    """A zero, infinite or NaN row keeps its bits, its neighbours are projected."""
    start = random((3, 70))
    start[1] = torch.tensor([0.0, bad]).repeat(35)
    weight = start.clone()
    F.project_(weight)
    assert np.array_equal(exact(start[1]), exact(weight[1]), equal_nan=True)
    close([1.0, 1.0], F.unit_norms(weight[::2]), rtol=3 * noise(start))


def test_projecting_many_is_projecting_each() -> None:
    """Many weights end where each by itself does, for one radius, one each, and one per unit."""
    assert F.project_all_([]) == []
    shapes = [(4, 9), (3, 2, 3, 3), (5,)]
    for radius in (2.0, [1.0, 2.0, 3.0], torch.tensor([1.0, 2.0, 3.0]), [torch.arange(1.0, 5.0), 3.0, 0.5]):
        weights, copies = ([random(shape) for shape in shapes] for _ in range(2))
        each = [radius] * 3 if isinstance(radius, float) else radius
        norms = [F.project_(weight, r) for weight, r in zip(copies, each, strict=True)]
        assert all(map(torch.equal, norms, F.project_all_(weights, radius)))
        assert all(map(torch.equal, copies, weights))


def test_autograd_sees_a_projection() -> None:
    """A parameter is projected in place without a graph, and a graph that still needs it says so."""
    parameter = nn.Parameter(random((3, 4)))
    loss = parameter.square().sum()
    assert not F.project_(parameter).requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
