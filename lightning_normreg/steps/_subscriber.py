"""What a dispatcher tells of each optimizer step, and in what order."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg.steps._record import StepRecord


class Phase(IntEnum):
    """Order in which subscribers see an update: its angle is set, it is measured, then weights are projected."""

    CONTROL = 0
    MEASURE = 1
    PROJECT = 2


class StepSubscriber:
    """Is told of each update of each optimizer; a subclass says what it does then, and what a checkpoint keeps of it.

    Attributes:
        phase: When its turn is.
        record: What all subscribers of a dispatcher know together of the step under way.
    """

    phase = Phase.MEASURE

    def __init__(self) -> None:
        self.record = StepRecord()

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """The optimizer is about to step; gradients may be stale or missing, because a closure may run in between."""

    def gradients_ready(self, index: int, optimizer: Optimizer, scale: float | None) -> None:
        """The gradients of the coming update are complete; told once for each update, before it or inside of it.

        Args:
            index: Index of the optimizer.
            optimizer: The optimizer.
            scale: Loss scale that is still in the gradients; None where nobody has said that they were complete, so
                that they may be clipped already.
        """

    def change_groups(self, index: int, optimizer: Optimizer) -> None:
        """The optimizer computes next: each time that its closure has returned, or at once where it has none.

        The only event at which its ``param_groups`` may be replaced: no user code runs until they are put back.
        """

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """The optimizer has updated its parameters, unless ``skipped`` (on the device, to be read later) is 1."""

    def restore_groups(self, index: int, optimizer: Optimizer) -> None:
        """User code runs next: a closure again, or the step is over for all subscribers, or has raised.

        Told once after each ``change_groups``, which is undone here.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed goes on from, in plain types and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which may hold other subscribers' too."""
