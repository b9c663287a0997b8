"""The first projection: what goes along with it, and what it changes all the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_normreg._symmetries import OwnStep, ProbeError
from lightning_normreg._weights import Watched, listed
from lightning_normreg.callbacks._probing import can_be_copied, few_samples
from lightning_normreg.callbacks._run import optimizers_of, run_of
from lightning_normreg.steps._following import change_and_follow, keeps_running_statistics
from lightning_normreg.steps._twins import find_twins, prefix_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

Twins = Literal["follow", "keep"]
KEPT = 1e-2
"""Change of outputs, of their size, up to which the function counts as kept."""


def twins_of(trainer: Trainer, targets: Sequence[Watched], twins: Twins) -> list[tuple[Watched, Watched]]:
    """Targets with those copies that are to follow: of what is scale-invariant, so that they compute what they did."""
    invariant = [target for target in targets if target.invariant]
    found = find_twins(invariant, run_of(trainer).named, optimizers_of(trainer))
    if found:
        done = "follow the first projection" if twins == "follow" else "are left as they are"
        rank_zero_info(
            f"Copies that no optimizer updates, as of an averaged teacher, {done} (twins={twins!r}): "
            f"{listed([t.name for _, t in found], 5)}."
        )
    return found if twins == "follow" else []


def keep_the_function(
    trainer: Trainer,
    pl_module: LightningModule,
    batch: Any,
    step: OwnStep,
    project: Callable[[], None],
    *,
    twins: Sequence[tuple[Watched, Watched]],
    allowed: bool,
) -> None:
    """Project for the first time, let running statistics follow, and say by how much outputs change all the same."""
    try:
        if not can_be_copied(pl_module) and not keeps_running_statistics(pl_module):
            raise ProbeError("The model is sharded, or too large to be copied.")
        samples = [batch, few_samples(batch)]
        parts = [prefix_of(twin.name, target.name) for target, twin in twins]
        moved = change_and_follow(pl_module, samples, project, trainer.strategy.broadcast, step, twins=parts)
    except (ProbeError, ValueError) as error:
        project()  # again, where the error came after it: what is at its radius does not move
        if keeps_running_statistics(pl_module):
            rank_zero_warn(
                f"Running statistics could not follow the first projection: {error} Until they have caught up by "
                "themselves, evaluation is off."
            )
        else:
            rank_zero_info(f"What the first projection changes of the outputs was not measured. {error}")
        return
    said = f"by {moved.training:.2g} of their size in training and {moved.evaluation:.2g} in evaluation mode"
    if any(map(math.isnan, moved)):
        rank_zero_info(
            "Outputs before and after the first projection could not be compared: they are not the same ones."
        )
    elif max(moved) <= KEPT:
        rank_zero_info(f"The first projection keeps the function: outputs of this batch change {said}.")
    elif allowed:
        rank_zero_info(f"The first projection changes what the network computes, as allowed: outputs change {said}.")
    else:
        rank_zero_warn(
            f"The first projection changes what the network computes: outputs of this batch change {said}. An eps, or "
            "running statistics of a kind that is not known, are behind it. radius='initial' changes nothing."
        )
