"""What the callbacks share that act on weights of the user's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_normreg._symmetries import Symmetries, units_and_sets, watch_sets
from lightning_normreg._weights import UnitArgument, Verdict, Watched, check_selection, listed, watch
from lightning_normreg.callbacks._base import StepCallback
from lightning_normreg.callbacks._run import run_of
from lightning_normreg.steps._targets import OnNotInvariant, choose_targets

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
        symmetries: str | Mapping[str, Any] | Symmetries | None,
    ) -> None:
        super().__init__(invariance, symmetries)
        check_selection(unit, include, exclude)
        if unit == "set" and symmetries is None:
            raise ValueError("`symmetries` must not be None with unit='set': leave it at 'auto', or pass a file.")
        self.unit = unit
        self.include = include
        self.exclude = exclude

    def _reset(self) -> None:
        super()._reset()
        self._waiting: list[str] = []
        self._told = False

    @property
    def state_key(self) -> str:
        """Key of the callback's state; two of a class that act on different weights have different ones."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, unit=self.unit)

    def _selected(self, trainer: Trainer, verdict: Verdict | None = None) -> list[Watched]:
        return watch(run_of(trainer).named, self.include, self.exclude, self.unit, verdict or None)

    def _known(self, trainer: Trainer, verdict: Verdict) -> list[Watched]:
        """What is selected and not unknown; of the rest it is said that it has to wait."""
        watched = self._selected(trainer, verdict)
        run_of(trainer).warn_of_masks({w.name: verdict[w.name] for w in watched if w.name in verdict})
        waiting = [w.name for w in watched if w.name in verdict and verdict[w.name].is_unknown]
        new = [name for name in waiting if name not in self._waiting]
        self._waiting = waiting
        if new:
            rank_zero_info(
                f"{type(self).__name__} waits with {listed(new, 5)}, until it is known whether they are "
                f"scale-invariant. {verdict[new[0]].reason}"
            )
        return [w for w in watched if w.name not in waiting]

    def _sets(self, trainer: Trainer, watched: list[Watched], verdict: Verdict) -> tuple[list[Watched], list[Watched]]:
        """Sets that some of the weights are in, and what else is in these; none where all are units by themselves.

        Raises:
            ValueError: If sets are asked for, and cannot be known.
        """
        known = [w for w in watched if w.name in verdict]
        if self.unit not in ("auto", "set") or self.symmetries is None or all(w.invariant for w in known):
            return [], []
        symmetries, why = self._all_symmetries(trainer)
        if symmetries is None:
            said = " ".join(why)  # nothing on a rank that is not to blame
            if self.unit == "set":
                raise ValueError(f"`unit='set'` must know which tensors are scale-invariant together. {said}")
            if not self._told:
                self._told = True
                rank_zero_info(said)
            return [], []
        named = run_of(trainer).named
        return watch_sets(watched, named, symmetries, verdict, self.exclude)

    def _choose(self, trainer: Trainer, verdict: Verdict, otherwise: OnNotInvariant, *, named: bool) -> list[Watched]:
        """What to act on of the selected weights, which the user has ``named`` or not; nothing while all have to wait.

        Once optimizers have stepped, a named weight that is found not to be scale-invariant is skipped: a run that has
        come this far is not ended.
        """
        waits = not (named and otherwise == "allow")
        watched = self._known(trainer, verdict) if waits else self._selected(trainer, verdict)
        if self.unit == "set":
            watched = units_and_sets(watched, self._sets(trainer, watched, verdict)[0])
        if waits and self._waiting and not (any(w.invariant for w in watched) or (named and watched)):
            return []
        if self.unit == "set" and not named and verdict and not any(w.invariant for w in watched):
            if ruled := [w.name for w in watched if w.members]:
                raise ValueError(
                    f"There must be something to act on, but {listed(ruled, 5)} is scale-invariant only where eps is "
                    "negligible, and at the present weights its share is above 10 %. Use a smaller eps, or larger "
                    "initial weights."
                )
            raise ValueError(
                "There must be something to act on, but no selected weights are scale-invariant, neither by themselves "
                "nor together. With a tied head the stream's writers are not: their size shows in the logits. Untie "
                "it, or use unit='layer' with `include` and on_not_invariant='allow'."
            )
        if otherwise == "raise" and run_of(trainer).dispatcher.has_seen_updates:
            otherwise = "skip"
        return choose_targets(watched, verdict, named=named, otherwise=otherwise, callback=type(self).__name__)
