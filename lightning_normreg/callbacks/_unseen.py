"""Updates that nobody sees: weights move and no optimizer's step was told of, or no step could come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_normreg._weights import is_flat, local
from lightning_normreg.steps._step_hooks import StepDispatcher, torch_optimizer

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

PATIENCE = 10
"""Batches without a step after which weights are looked at, and again after twice as many."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class UnseenSteps:
    """Says once why no step was seen. Reads no weight once each optimizer has been seen to step.

    Whether a step was due nobody knows under manual optimization, so the weights themselves tell: checksums of those
    that are trained, which accumulation, a scaler that skips and frozen weights leave alone.
    """

    def __init__(self, dispatcher: StepDispatcher) -> None:
        self._dispatcher = dispatcher
        self._checksums: dict[Tensor, Tensor] = {}
        self._start: tuple[int, int] | None = None
        self._next = PATIENCE
        self.told = False
        self.batches = 0  # that have begun
        self.backwards = 0

    def forget(self) -> None:
        """Weights have been moved by a callback of this package."""
        self._checksums = {}

    @torch.no_grad()
    def begin_batch(self, trainer: Trainer) -> None:
        """Look, every few batches."""
        self._start = self._start or (trainer.global_step, _started(trainer))
        if self.told or all(map(self._dispatcher.has_updated, range(len(trainer.optimizers)))):
            return
        if self.batches == self._next:
            self._next *= 2
            self._say(self.why(trainer))
        if self.batches and not self._checksums:
            self._checksums = self._present(trainer)
        self.batches += 1

    def end(self, trainer: Trainer) -> None:
        """Say at the end of a run without a step that there was none."""
        if not self.told and self.batches and not self._dispatcher.has_seen_updates:
            self._say(
                self.why(trainer)
                or f"No optimizer of the Trainer has updated a weight in {self.batches} batches, so there was nothing "
                "to do. No weight has moved either: look whether gradients reach those that are trained, whether a "
                "gradient scaler has skipped all steps, and whether your code calls `step()`."
            )

    def _say(self, why: str) -> None:
        if why:
            self.told = True
            rank_zero_warn(why)

    @torch.no_grad()
    def why(self, trainer: Trainer) -> str:
        """Why no step was seen so far, empty where that may be as it should."""
        assert self._start is not None
        automatic, seen = trainer.lightning_module.automatic_optimization, self._dispatcher.has_seen_updates
        if not seen and _started(trainer) == self._start[1]:
            return (
                f"`on_train_batch_start` has returned -1 in each of {self.batches} batches, so the rest of each epoch "
                "was skipped and no optimizer has stepped: there was nothing to do. Return -1 only where an epoch "
                "is to end."
            )
        if automatic and not seen and not self.backwards:
            return (
                f"`training_step` has returned no loss in {self.batches} batches, so no optimizer has stepped: there "
                "was nothing to do. Return the loss, or set `automatic_optimization = False` and step yourself."
            )
        if automatic and trainer.global_step == self._start[0]:
            return ""  # none was due
        now = self._present(trainer)
        common = [p for p in now if p in self._checksums]
        if not common or torch.equal(*(torch.stack([found[p] for p in common]) for found in (self._checksums, now))):
            return ""
        names = dict.fromkeys(type(o).__name__ for i, o in enumerate(trainer.optimizers) if self._is_unseen(i))
        return (
            f"No step of {', '.join(names)} has been seen in {self.batches} batches although its weights have moved: "
            "these updates are neither measured nor held. Call `step()` of what `configure_optimizers` returns; "
            "another optimizer's step, and weights that are written by hand, are not seen."
        )

    def _is_unseen(self, index: int) -> bool:
        return not self._dispatcher.has_updated(index)

    def _present(self, trainer: Trainer) -> dict[Tensor, Tensor]:
        """Checksums of the trained weights that only optimizers have which were not seen to step."""
        found: dict[bool, set[Tensor]] = {True: set(), False: set()}
        for index, optimizer in enumerate(map(torch_optimizer, trainer.optimizers)):
            found[self._is_unseen(index)].update(p for group in optimizer.param_groups for p in group["params"])
        device = trainer.strategy.root_device
        return {p: _checksum(p).to(device) for p in found[True] - found[False] if p.requires_grad}


class BackwardGuard:
    """Notices parameters that are updated during the backward pass, by optimizers that nobody knows of.

    Gradients may be gone when such an optimizer has used them, and its step is none of the Trainer's: without this,
    nothing would be measured or held, and nothing said. Counters of in-place writes tell, which cost no tensor
    operation.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        # The pieces of FSDP's first version are exchanged during the backward pass.
        self._parameters = [(name, p) for name, p in named if p.requires_grad and not is_flat(p)]
        self._writes: list[int] = []

    def begin(self) -> None:
        """The backward pass is about to begin."""
        self._writes = [p._version for _, p in self._parameters]

    def end(self) -> None:
        """The backward pass has ended, and no optimizer that is known has stepped.

        Raises:
            NotImplementedError: If parameters have been written all the same.
        """
        pairs = zip(self._parameters, self._writes, strict=True)
        written = [name for (name, p), writes in pairs if p._version != writes]
        if written:
            raise NotImplementedError(
                f"`configure_optimizers` must return the optimizers that update the weights, but {written[0]!r} and "
                f"{len(written) - 1} more parameters were written during the backward pass (an optimizer that steps "
                "in hooks of gradients): such steps can neither be measured nor followed by a projection. Let one "
                "optimizer of the Trainer step after it; or return those of the hooks from `configure_optimizers`, "
                "with automatic_optimization = False."
            )


def _checksum(parameter: Tensor) -> Tensor:
    """Sum over the bits of entries as numbers: no entry changes without it, unless by a rare accident."""
    held = local(parameter.detach())
    held = torch.view_as_real(held) if held.is_complex() else held
    return held.view(_BITS[held.element_size()]).sum(dtype=torch.int64)


def _started(trainer: Trainer) -> int:
    """Batches that ``on_train_batch_start`` has let through."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.started)  # type: ignore[attr-defined]
