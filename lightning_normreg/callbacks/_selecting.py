"""What the callbacks share that act on weights of the user's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_normreg._weights import UnitArgument, Verdict, Watched, check_selection, watch
from lightning_normreg.callbacks._base import StepCallback
from lightning_normreg.callbacks._run import run_of

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class WeightCallback(StepCallback):
    """A callback that acts on weights which its arguments select, in the units that they ask for."""

    def __init__(
        self,
        unit: UnitArgument,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        invariance: str | Mapping[str, Any] | None,
    ) -> None:
        super().__init__(invariance)
        check_selection(unit, include, exclude)
        self.unit = unit
        self.include = include
        self.exclude = exclude

    @property
    def state_key(self) -> str:
        """Key of the callback's state; two of a class that act on different weights have different ones."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, unit=self.unit)

    def _selected(self, trainer: Trainer, verdict: Verdict | None = None) -> list[Watched]:
        return watch(run_of(trainer).named, self.include, self.exclude, self.unit, verdict or None)
