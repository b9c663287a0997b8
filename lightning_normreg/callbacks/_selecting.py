"""What the callbacks share that act on weights of the user's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_normreg._weights import UnitArgument, Verdict, Watched, check_selection, listed, watch
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

    def _reset(self) -> None:
        super()._reset()
        self._waiting: list[str] = []

    @property
    def state_key(self) -> str:
        """Key of the callback's state; two of a class that act on different weights have different ones."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, unit=self.unit)

    def _selected(self, trainer: Trainer, verdict: Verdict | None = None) -> list[Watched]:
        return watch(run_of(trainer).named, self.include, self.exclude, self.unit, verdict or None)

    def _known(self, trainer: Trainer, verdict: Verdict) -> list[Watched]:
        """What is selected and not unknown; of the rest it is said that it has to wait."""
        watched = self._selected(trainer, verdict)
        waiting = [w.name for w in watched if w.name in verdict and verdict[w.name].is_unknown]
        new = [name for name in waiting if name not in self._waiting]
        self._waiting = waiting
        if new:
            rank_zero_info(
                f"{type(self).__name__} waits with {listed(new, 5)}, until it is known whether they are "
                f"scale-invariant. {verdict[new[0]].reason}"
            )
        return [w for w in watched if w.name not in waiting]
