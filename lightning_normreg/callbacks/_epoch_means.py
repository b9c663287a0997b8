"""Means over an epoch, of whatever curves there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric


class EpochMeans(Metric):
    """Mean of each tag over the rows that had it, in float64 and of this process; NaN stays NaN.

    One vector for all tags: a metric for each would cost 50 µs for each value.
    """

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)  # every process has the same values
        self.add_state("totals", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self._places: dict[str, int] = {}

    def update(self, values: Mapping[str, float], counts: float | Tensor = 1.0) -> None:
        """Add a row, or sums over several with their counts."""
        for tag in values:
            self._places.setdefault(tag, len(self._places))
        at = torch.tensor([self._places[tag] for tag in values], dtype=torch.int64)
        row = torch.tensor(list(values.values()), dtype=torch.float64)
        new = row.new_zeros(len(self._places) - len(self.totals))
        self.totals = torch.cat([self.totals, new]).index_add(0, at, row)
        self.counts = torch.cat([self.counts, new]).index_add(0, at, torch.as_tensor(counts).to(row).expand_as(row))

    def compute(self) -> dict[str, float]:
        """Mean of each tag, in the order in which tags came."""
        return dict(zip(self._places, (self.totals / self.counts).tolist(), strict=True))

    def reset(self) -> None:
        """Forget all tags."""
        super().reset()
        self._places = {}

    def sums(self) -> dict[str, tuple[float, float]]:
        """Sum and count of each tag, in plain types."""
        return dict(zip(self._places, zip(self.totals.tolist(), self.counts.tolist(), strict=True), strict=True))

    def add_sums(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Go on from :meth:`sums`."""
        if sums:
            counts = torch.tensor([count for _, count in sums.values()], dtype=torch.float64)
            self.update({tag: total for tag, (total, _) in sums.items()}, counts)
