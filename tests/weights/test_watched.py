"""Units in a part of a tensor, as in a fused projection of queries, keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_normreg import ScaleInvariance
from lightning_normreg._weights._roles import named_roles
from lightning_normreg._weights._selection import watch
from lightning_normreg._weights._table import Table

VERDICTS = {
    "equal-blocks": ScaleInvariance("block", dim=0, block_size=2, slices=((0, 4), (8, 10))),
    "ranges": ScaleInvariance("block", dim=0, block_size=None, slices=((0, 3), (5, 7))),
    "columns": ScaleInvariance("column", dim=1, block_size=1, slices=((1, 3),)),
}
ROWS = {"equal-blocks": [(0, 2), (2, 4), (8, 10)], "ranges": [(0, 3), (5, 7)], "columns": [(1, 2), (2, 3)]}


@pytest.mark.parametrize("case", VERDICTS)
def test_units_in_a_part_of_a_tensor(case: str) -> None:
    """Norms, rotation and projection are those of the covered slices; all other entries keep their bits."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 12).double()
    (watched,) = watch(named_roles(layer), ["weight"], (), "auto", {"weight": VERDICTS[case]})
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(torch.randn(12, 6, dtype=torch.float64), alpha=0.01)
    after = layer.weight.detach().clone()

    def units(weight: torch.Tensor) -> list[np.ndarray]:
        array = weight.numpy().T if case == "columns" else weight.numpy()
        return [array[start:stop].ravel() for start, stop in ROWS[case]]

    norms = [np.sqrt((u**2).sum()) for u in units(after)]
    chords = [
        np.sqrt(((a / np.sqrt((a**2).sum()) - b / n) ** 2).sum())
        for a, b, n in zip(units(before), units(after), norms, strict=True)
    ]
    table = Table([watched])
    # Float64: sums of at most 36 terms, and a chord of about 0.1.
    assert table.norms().units.tolist() == pytest.approx(norms, rel=1e-14)
    angles = table.lengths(lambda p: before).rotation()
    assert angles.tolist() == pytest.approx([2 * np.arcsin(c / 2) for c in chords], rel=1e-12)
    radii = torch.arange(1.0, len(norms) + 1, dtype=torch.float64)
    assert table.project(radii).tolist() == pytest.approx(norms, rel=1e-14)
    assert [np.sqrt((u**2).sum()) for u in units(layer.weight.detach())] == pytest.approx(radii.tolist(), rel=1e-14)
    covered = torch.zeros(12, 6, dtype=torch.bool)
    for start, stop in ROWS[case]:
        (covered.T if case == "columns" else covered)[start:stop] = True
    assert torch.equal(layer.weight.detach()[~covered], after[~covered])
    assert not (layer.weight.detach()[covered] == after[covered]).any()
