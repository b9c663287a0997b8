"""How far rows of embeddings turn, by how often they were looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normreg import _metrics
from lightning_normreg._metrics import Curve
from lightning_normreg._weights import Part, Watched
from lightning_normreg.steps._step_hooks import by_parameter, of_mine
from lightning_normreg.steps._subscriber import StepSubscriber

CLASSES = (_metrics.ROTATION_NEVER, _metrics.ROTATION_SELDOM, _metrics.ROTATION_OFTEN)


class _Counter:
    """Counts what an embedding looks up; in a copy of the module, or a saved one, it is a hook that does nothing."""

    def __init__(self, counts: dict[str, Tensor], name: str) -> None:
        self._counts, self._name = counts, name

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        if part.training and args and isinstance(args[0], Tensor):
            ids = args[0].detach().flatten()
            self._counts[self._name].index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_counter, ()


def _no_counter() -> Callable[..., None]:
    return _count_nothing


def _count_nothing(part: nn.Module, args: tuple[Any, ...]) -> None:
    pass


class EmbeddingRows(StepSubscriber):
    """Root mean square rotation of the rows that were looked up never, seldom and often since the last look.

    Seldom is at most the median over the rows that were looked up at all. Every forward pass of an ``nn.Embedding`` in
    training counts, on all processes together.

    Args:
        watched: Embeddings, among other weights.
        module: The module that they are in.
        is_due: Whether the coming update of an optimizer is measured.
    """

    def __init__(self, watched: Sequence[Watched], module: nn.Module, is_due: Callable[[int], bool]) -> None:
        super().__init__()
        self._is_due = is_due
        named = {w.parameter: w for w in watched if not w.members}
        self._rows: list[Watched] = []
        self._counts: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._found: dict[str, Tensor] = {}
        self._looking = False
        for part in module.modules():
            weight = part.weight if isinstance(part, nn.Embedding) else None
            w = named.get(weight) if isinstance(weight, nn.Parameter) else None
            if w is not None:
                self._counts[w.name] = torch.zeros(w.shape[0], device=w.parameter.device)
                self._handles.append(part.register_forward_pre_hook(_Counter(self._counts, w.name)))
                if all(row.name != w.name for row in self._rows):
                    self._rows.append(Watched(w.name, w.parameter, w.role, (Part("neuron"),)))
        self._by_parameter = by_parameter(self._rows)

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """Ask for what the step does to the rows."""
        mine = [w for w, _, _ in of_mine([optimizer], self._by_parameter)]
        self._looking = bool(mine) and self._is_due(index)
        if self._looking:
            self.record.want(mine, updates=True)

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Part the rows by their counts; the device is not waited for."""
        if not self._looking or not self.record.wanted:
            return
        look = self.record.look(index)
        assert look.lengths is not None
        rotations = look.table.split(look.lengths.rotation())
        places = {w.key: place for place, w in enumerate(look.table.watched)}
        for w in self._rows:
            if w.key not in places:
                continue
            counts = self._counts[w.name]
            self._counts[w.name] = torch.zeros_like(counts)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(counts)
            usual = torch.where(counts > 0, counts, torch.nan).nanmedian()
            turned = rotations[places[w.key]]
            classes = [counts == 0, (counts > 0) & (counts <= usual), counts > usual]
            masks = torch.stack(classes).to(turned)
            self._found[w.name] = torch.stack([masks @ turned.square(), masks.sum(dim=1)])

    def collect(self) -> dict[str, dict[Curve, float]]:
        """Read the rotations back, and forget them; there is none of a class without rows."""
        found = {}
        for name, sums in self._found.items():
            squares, sizes = sums.tolist()
            pairs = zip(CLASSES, squares, sizes, strict=True)
            found[name] = {curve: (square / size) ** 0.5 for curve, square, size in pairs if size}
        self._found = {}
        return found

    def remove(self) -> None:
        """Take the counters off."""
        while self._handles:
            self._handles.pop().remove()
