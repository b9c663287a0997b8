"""What the subscribers of a dispatcher know together of the step under way, each thing found out once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from lightning_normreg._weights import Norms, Table, Watched, gradient_of, local, share
from lightning_normreg.functional._lengths import Lengths

KEPT = 8
"""Tables of the last steps: optimizers that take turns have one each."""


@dataclass(frozen=True)
class SeenGradients:
    """Gradients before clipping, at the weights that the update starts from: sums that are not shared yet."""

    table: Table  # the weights
    sums: Tensor  # as Table.gradients gives them
    scale: float  # loss scale that is still in them


@dataclass(frozen=True)
class Look:
    """One step as all see it who measure it."""

    table: Table  # the weights that somebody has asked for
    norms: Norms  # norms before the step
    lengths: Lengths | None  # what the step did; None where only norms were wanted
    # norm of the gradient of each unit, which the optimizer has used; None where nobody wanted it
    gradients: Tensor | None
    # for each who noted gradients before clipping: weights, their gradients as seen from units, and norms of these
    seen: dict[object, tuple[Table, Lengths, Tensor]]


class StepRecord:
    """Copies of weights before a step, what was measured of it, and what a controller has made of it.

    Attributes:
        copies: Parameter → what this process held of it before the step, in memory that is kept for the next one.
        factors: Key of a weight → by what a controller has multiplied the tangential part of its update.
        seen: Index of an optimizer, and who wants them → its gradients before clipping.
    """

    def __init__(self) -> None:
        self.copies: dict[Parameter, Tensor] = {}
        self.factors: dict[object, Tensor] = {}
        self.seen: dict[tuple[int, object], SeenGradients] = {}
        self._tables: dict[tuple[object, ...], Table] = {}
        self._fresh: set[Parameter] = set()
        self.begin()

    def begin(self) -> None:
        """Forget the last step."""
        self._fresh.clear()
        self.factors.clear()
        self.wanted: dict[object, Watched] = {}
        self._updates = self._gradients = False
        self._squares: Tensor | None = None
        self._look: Look | None = None

    def allocate(self, parameters: Iterable[Parameter]) -> int:
        """Make room for copies, so that memory runs out at the start or never; the bytes that are new."""
        size = 0
        for parameter in parameters:
            if parameter not in self.copies:
                self.copies[parameter] = torch.empty_like(local(parameter))
                size += self.copies[parameter].numel() * parameter.element_size()
        return size

    def copy(self, parameters: Iterable[Parameter]) -> None:
        """Copy parameters before the step, each once however many ask for it."""
        new = [p for p in dict.fromkeys(parameters) if p not in self._fresh]
        self.allocate(new)
        for parameter in new:
            self.copies[parameter].copy_(local(parameter), non_blocking=True)
        self._fresh.update(new)

    def table(self, watched: Sequence[Watched]) -> Table:
        """The table of some weights; the last ones are kept."""
        key = tuple(w.key for w in watched)
        table = self._tables.pop(key, None) or Table(watched)
        self._tables[key] = table
        if len(self._tables) > KEPT:
            del self._tables[next(iter(self._tables))]
        return table

    def want(self, watched: Iterable[Watched], *, updates: bool = False, gradients: bool = False) -> None:
        """Ask before the step for norms of some weights, and for what the step does, or for its gradients."""
        self.wanted |= {w.key: w for w in watched}
        self._updates |= updates
        self._gradients |= gradients

    def prepare(self) -> None:
        """All have asked: copy the weights, or take their norms where that is all that is wanted."""
        if self._updates:
            self.copy(p for w in self.wanted.values() for p in w.tensors())
        elif self.wanted:
            self._squares = self.table(list(self.wanted.values())).squares()

    def look(self, index: int) -> Look:
        """What was asked for of the step of an optimizer, measured once and shared between processes at once."""
        if self._look is None:
            table = self.table(list(self.wanted.values()))
            seen = {key[1]: self.seen.pop(key) for key in list(self.seen) if key[0] == index}
            sums = table.compare(self.copies.__getitem__) if self._squares is None else self._squares
            parts = [(table, sums)]
            if self._gradients:
                parts.append((table, table.squares(gradient_of)))
            parts += [(one.table, one.sums) for one in seen.values()]
            shared = iter(share(parts))
            first = next(shared)
            lengths = table.lengths_of(first) if self._squares is None else None
            gradients = table.norms_of(next(shared)).units if self._gradients else None
            noted = {}
            for who, one in seen.items():
                last = next(shared)
                # Of a tensor the square of its gradient is what is across its parts, and what is along them.
                norms = (last[2] + last[4])[sum(one.table.sizes) :].sqrt() / one.scale
                noted[who] = (one.table, one.table.lengths_of(last), norms)
            self._look = Look(table, table.norms_of(first), lengths, gradients, noted)
        return self._look
