"""Rotations that a run has logged, as angles for another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from lightning_normreg import _metrics
from lightning_normreg._plot import runs_of

if TYPE_CHECKING:
    from lightning_normreg._plot import Source

Over = Literal["steps", "share"]


class Replay:
    """What one run has logged of its rotations, linearly interpolated between logged steps.

    Before the first and after the last of them the angle is as there.

    Args:
        source: Folder, file or data frame with the curves of one run.
        over: ``"steps"``: a step has the angle of the logged step of that number; ``"share"``: from the first step to
            the last planned one the angles go from the first to the last logged one.

    Attributes:
        curves: By name the logged steps and rotations, those that are finite.

    Raises:
        ValueError: If that is not one run that has logged rotations.
    """

    def __init__(self, source: Source, over: Over = "steps") -> None:
        if over not in get_args(Over):
            raise ValueError(f"`replay_over` must be 'steps' or 'share', got {over!r}.")
        self._over = over
        try:
            runs = runs_of(source, "replay")
        except ValueError as error:
            raise ValueError(f"`replay` must be the log of a run. {error}") from error
        if len(runs) > 1:
            raise ValueError(f"`replay` must be one run, but there are {len(runs)}: {runs[0].name}, {runs[1].name}, …. "
                             "Give the folder of one, or history() of one monitor.")  # fmt: skip
        lines = runs[0].lines(_metrics.ROTATION)
        self.curves = {name: (line.index.to_numpy(float), line.to_numpy(float)) for name, line in lines.items()}
        if not self.curves:
            raise ValueError(
                f"`replay` must have curves of the rotation, but {runs[0].name or 'the data frame'} has only others. "
                "Train that run with an EffectiveLRMonitor(per_layer=True)."
            )

    def speed(self, planned: float) -> float:
        """Logged steps for each step of a run of ``planned`` steps.

        Raises:
            ValueError: If the log is too short for that run, or the run has no end.
        """
        steps = np.unique(np.concatenate([steps for steps, _ in self.curves.values()]))
        if not 1 <= planned < float("inf"):
            raise ValueError("`replay` must be for a run of a known length, got one without an end. Give the Trainer "
                             f"max_steps={steps[-1] + 1:g}.")  # fmt: skip
        if self._over == "share":
            return float(steps[-1] / max(planned - 1, 1))
        # Of a log with a row every n steps the last one is up to n steps before the end.
        if planned - 1 > steps[-1] + max(np.diff(steps), default=0):
            raise ValueError(
                f"`replay` must be as long as the run with replay_over='steps', but its last step is {steps[-1]:g}, "
                f"and {planned:g} steps are planned. Give the Trainer max_steps={steps[-1] + 1:g}, or say "
                "replay_over='share'."
            )
        return 1.0

    def angle(self, name: str, step: float) -> float:
        """Rotation of a weight at a logged step, or between two."""
        return float(np.interp(step, *self.curves[name]))
