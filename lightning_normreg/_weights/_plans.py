"""Operations on the rows of many pieces, which are made once and done again as long as these stay in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normreg.functional._device import BLOCK, accumulator, number_type, sum_type
from lightning_normreg.functional._lengths import squared
from lightning_normreg.functional._norms import Operation, cells_of

Make = Callable[[int, Tensor], list[Operation]]
"""From the number of a piece and the place of its numbers to the operations on it."""


class _Plan(NamedTuple):
    """Operations on tensors that lie at some addresses, and numbers of theirs by type, which stay in their place."""

    addresses: list[int]
    numbers: dict[torch.dtype, Tensor]
    operations: list[Operation]

    def run(self) -> None:
        """Do them all."""
        for operation in self.operations:
            operation()


class Plans:
    """For some pieces, whose rows come one after the other: sums over rows, and changes by numbers for each row.

    Attributes:
        rows: The places of the rows of each piece.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        device, self._dtype = rows[0].device, number_type(rows[0])
        self._counts = [len(each) for each in rows]
        self._cells = [cells_of(each) for each in rows]
        self.rows = [slice(*pair) for pair in pairwise(accumulate(self._counts, initial=0))]
        self._ends = torch.tensor([0, *accumulate(self._counts)], device=device)
        # Of which row each cell is, where there is more than one of a row.
        cells = torch.tensor(self._cells).repeat_interleave(torch.tensor(self._counts))
        several = any(count != 1 for count in self._cells)
        self._row_of_cell = torch.arange(len(cells)).repeat_interleave(cells).to(device) if several else None
        self._plans: dict[str, _Plan] = {}

    def sums(self, what: str, lines: int, make: Make, *tensors: Sequence[Tensor]) -> Tensor:
        """Sums over rows from operations that write norms, of products in the third line, into their cells."""

        def shaped(number: int, numbers: Tensor) -> list[Operation]:
            return make(number, numbers.view(lines, self._counts[number], self._cells[number]))

        counts = [rows * cells for rows, cells in zip(self._counts, self._cells, strict=True)]
        plan = self._planned(what, lines, counts, [sum_type(rows) for rows in tensors[0]], shaped, *tensors)
        plan.run()
        first, *others = (numbers.to(self._dtype) for numbers in plan.numbers.values())
        sums = squared(sum(others, first))
        if self._row_of_cell is None:
            return sums
        return sums.new_zeros(lines, sum(self._counts)).index_add_(1, self._row_of_cell, sums)

    def _planned(
        self,
        what: str,
        lines: int,
        counts: Sequence[int],
        types: Sequence[torch.dtype],
        make: Make,
        *tensors: Sequence[Tensor],
    ) -> _Plan:
        """What was made for tensors that lie where they lay before, or a new plan, which gradients are not kept in."""
        addresses = [tensor.data_ptr() for each in tensors for tensor in each]
        plan = self._plans.get(what)
        if plan is None or plan.addresses != addresses:
            like, shape = tensors[0][0], (lines, sum(counts))
            with torch.inference_mode(mode=False):  # what is made in it cannot be written to outside of it
                numbers = {t: like.new_zeros(shape, dtype=t) for t in dict.fromkeys(types)}
                places = {t: torch.split(of_type, list(counts), 1) for t, of_type in numbers.items()}
                operations = [op for n, t in enumerate(types) for op in make(n, places[t][n])]
            plan = _Plan(addresses, numbers, operations)
            if what != "gradients":
                self._plans[what] = plan
        return plan

    def write(self, what: str, columns: Sequence[Tensor], make: Make, *tensors: Sequence[Tensor]) -> None:
        """Change tensors by numbers for each row."""
        plan = self._planned(
            what, len(columns), self._counts, [accumulator(t.dtype) for t in tensors[0]], make, *tensors
        )
        for numbers in plan.numbers.values():
            for place, column in zip(numbers, columns, strict=True):
                place.copy_(column)
        plan.run()

    def detour(
        self, odd: Tensor, tensors: Sequence[Sequence[Tensor]], way: Callable[..., Tensor], *more: Tensor
    ) -> Tensor:
        """What ``way`` gives for the marked rows and numbers of theirs: small pieces with equal rows at once."""
        places = odd.nonzero().flatten()
        bounds = torch.searchsorted(places, self._ends).tolist()
        found: list[Tensor] = []
        batch: list[list[Tensor]] = []
        entries = done = 0

        def flush(stop: int) -> None:
            rows = batch[0] if len(batch) == 1 else [torch.cat(each) for each in zip(*batch, strict=True)]
            found.append(way(*rows, *(m[done:stop] for m in more)))

        for number, (low, high) in enumerate(pairwise(bounds)):
            if low == high:
                continue
            own = [each[number] for each in tensors]
            if high - low < self._counts[number]:  # else without a copy of them
                own = [rows[places[low:high] - self.rows[number].start] for rows in own]
            fits = batch and own[0].shape[1:] == batch[0][0].shape[1:] and own[0].dtype == batch[0][0].dtype
            if batch and not (fits and entries + own[0].numel() <= BLOCK["host"]):
                flush(low)
                batch, entries, done = [], 0, low
            batch.append(own)
            entries += own[0].numel()
        flush(len(places))
        return torch.cat(found, dim=-1)
