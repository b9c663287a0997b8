"""``rotate_`` against its formula in longer floats, and at its edges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_normreg.functional import rotate_, unit_norms
from lightning_normreg.functional._device import as_on

INF, NAN = math.inf, math.nan


def oracle(weight: Tensor, before: Tensor, angle: float, per: str) -> np.ndarray:
    """The great circle from one row towards the other, in the longest floats of the machine."""
    a, b = (t.flatten(1).numpy().astype(np.longdouble) for t in (before, weight))
    norm = np.sqrt((a**2).sum(1, keepdims=True))
    direction = a / norm
    across = b - (direction * b).sum(1, keepdims=True) * direction
    length = np.sqrt((across**2).sum(1, keepdims=True))
    speed = length / norm
    theta = angle * (speed / np.sqrt((speed**2).mean()) if per == "layer" else np.ones_like(speed))
    theta = np.minimum(theta, np.pi / 2) if per == "layer" else theta
    return norm * (direction * np.cos(theta) + across / length * np.sin(theta))


@pytest.fixture(params=["host", "wide"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """As a CPU does it, or a GPU, which is not to be waited for."""
    with as_on(request.param):
        yield


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("per", ["layer", "unit"])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (2, 600), (2, 300_000)], ids=str)
@pytest.mark.parametrize("radial, scale", [(0.0, 1.0), (-0.5, 1.0), (-30.0, 1.0), (-0.5, 1e-12), (-30.0, 1e12)])
def test_against_the_formula(radial: float, scale: float, shape: Any, per: Any) -> None:
    """In float32, at any scale, with updates that are mostly radial, as on devices that are not to be waited for."""
    generator = torch.Generator().manual_seed(0)
    before = scale * torch.randn(shape, generator=generator)
    step = 1e-3
    weight = before * (1 + radial * step) + step * scale * torch.randn(shape, generator=generator)
    for angle in (1e-4, 0.03, 1.0):
        found = weight.clone()
        rotate_(found, before, angle, per=per)
        expected = oracle(weight, before, angle, per)
        # Both start from the rounded weights. Factors and entries have ten roundings of ε/2, of the result and of the
        # radial part, which is up to 1.5 · |radial| times the tangential one and cancels.
        error = np.abs(found.flatten(1).numpy() - expected).max(1) / np.abs(expected).max(1)
        turned = math.sin(min(angle * 3, math.pi / 2))
        assert error.max() < 6e-7 * (1 + 1.5 * abs(radial) * turned)


def test_float64_has_its_own_digits() -> None:
    """To 1e-15 at an angle of 1e-6."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    weight = before * 0.999 + 1e-4 * torch.randn(6, 50, generator=generator, dtype=torch.float64)
    found = weight.clone()
    rotate_(found, before, 1e-6)
    expected = oracle(weight, before, 1e-6, "layer")
    assert np.abs(found.numpy() - expected).max() < 2e-15


@pytest.mark.parametrize("unit, dim, groups, shape", [("neuron", 1, 1, (4, 6)), ("neuron", 1, 2, (4, 3, 2)),
                                                      (2, 0, 1, (6, 5)), ("layer", 0, 1, (6, 5))])  # fmt: skip
def test_units_of_every_kind(unit: Any, dim: int, groups: int, shape: Any) -> None:
    """Every unit turns by the angle, whichever entries it has."""
    from lightning_normreg.functional import rotation

    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = before + 0.01 * torch.randn(shape, generator=generator, dtype=torch.float64)
    angles = rotate_(weight, before, 0.2, unit, per="unit", radius=2.0, dim=dim, groups=groups)
    measured = rotation(before, weight, unit, dim=dim, groups=groups)
    torch.testing.assert_close(measured, torch.full_like(measured, 0.2), rtol=1e-13, atol=0)
    torch.testing.assert_close(angles, measured, rtol=1e-13, atol=0)
    norms = unit_norms(weight, unit, dim=dim, groups=groups)
    torch.testing.assert_close(norms, torch.full_like(norms, 2.0), rtol=1e-13, atol=0)


@pytest.mark.usefixtures("way")
def test_the_edges() -> None:
    """No update, one that is radial, decay alone, zero units, infinite and NaN ones: beside an ordinary unit."""
    before = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.6, 0.8], [0.3, 0.7], [0.0, 0.0], [0.0, 0.0], [1.0, 2.0],
                           [1.0, NAN], [1.0, 0.0]])  # fmt: skip
    weight = before.clone()
    weight[1] *= 2
    weight[2] *= -30.7
    weight[3] *= 0.99  # rounds, so that the update is not exactly radial
    weight[5] = torch.tensor([0.0, 0.5])
    weight[6, 0], weight[7, 0] = INF, 7.0
    weight[8, 1] = 0.1
    start = weight.clone()
    angles = rotate_(weight, before, 0.1, per="unit")
    assert angles.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, pytest.approx(0.1)]
    assert weight[:5].equal(before[:5])
    assert weight[5:7].equal(start[5:7])  # a radius of 0 cannot be held
    assert weight[7, 0] == 7.0
    assert weight[8].tolist() == pytest.approx([math.cos(0.1), math.sin(0.1)])
    weight = start.clone()
    rotate_(weight, before, 0.1, per="layer", radius=2.0)
    assert weight[5].tolist() == [0.0, 2.0]  # what was zero and has moved is put at the radius
    assert weight[4].tolist() == [0.0, 0.0]
    # The mean is over the units that are finite, of which one moves.
    assert math.atan2(*weight[8].flip(0).tolist()) == pytest.approx(0.1 * math.sqrt(7), rel=1e-6)


def test_a_unit_of_one_entry_does_not_turn() -> None:
    """Not even where the update would change its sign."""
    before = torch.tensor([[0.7], [-0.2]])
    weight = torch.tensor([[-0.3], [0.9]])
    assert rotate_(weight, before, 0.5, per="unit").tolist() == [0.0, 0.0]
    assert weight.equal(before)


def test_no_unit_of_a_layer_turns_by_more_than_a_right_angle() -> None:
    """Where one unit has almost all of the update; alone, each may turn by anything below π."""
    before = torch.eye(20)[:, :10][:10].clone()
    weight = before.roll(1, dims=1) * 1e-3 + before
    weight[0, 1:] = 5.0
    assert rotate_(weight, before, 0.9).max().item() == pytest.approx(math.pi / 2)
    weight = before + 0.1
    assert rotate_(weight, before, 3.0, per="unit").tolist() == pytest.approx([3.0] * 10)


def test_narrow_types() -> None:
    """Computed in float32 and rounded once: half a unit in the last place of bfloat16."""
    before = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = before + 0.1 * torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = oracle(weight.double(), before.double(), 0.3, "layer").astype(float)
    rotate_(weight, before, 0.3)
    assert np.abs(weight.double().numpy() - expected).max() < 2**-8 * np.abs(expected).max()


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"angle": math.pi}, r"`angle` must be in \[0, π\) radians, got 3\.14159"),
        ({"angle": -0.1}, r"`angle` must be in \[0, π\) radians, got -0\.1"),
        ({"angle": NAN}, r"`angle` must be in \[0, π\) radians, got nan"),
        ({"angle": 0.1, "per": "row"}, "`per` must be 'layer' or 'unit', got 'row'"),
        ({"angle": 0.1, "radius": 0.0}, "`radius` must be positive and finite, got 0.0"),
        ({"angle": 0.1, "before": torch.ones(3, 2)}, r"`before` must have the weight's shape \(2, 2\), got \(3, 2\)"),
    ],
)
def test_errors(arguments: dict[str, Any], match: str) -> None:
    """Each names the argument, the rule and the value."""
    with pytest.raises(ValueError, match=match):
        rotate_(torch.ones(2, 2), **{"before": torch.ones(2, 2)} | arguments)
