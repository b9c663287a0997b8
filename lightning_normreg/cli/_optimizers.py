"""``configure_optimizers`` from ``--optimizer`` and ``--lr_scheduler``, for a model that knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_normreg.cli._errors import blamed_on
from lightning_normreg.cli._groups import DecayGroup
from lightning_normreg.cli._schedulers import natural_interval


def configure_optimizers(
    module: nn.Module,
    *,
    make_optimizer: Callable[[Iterable[Any]], Optimizer],
    make_scheduler: Callable[[Optimizer], Any] | None,
    decay: DecayGroup | None,
    weight_decay: float | None,
    interval: str | None,
) -> Any:
    """Make the optimizer when training starts, so that parameters are those that are trained, sharded or not.

    ``decay`` is None for one group, ``weight_decay`` where the optimizer has no such argument, ``interval`` for the
    scheduler's own.
    """
    parameters: Iterable[Any] = module.parameters()
    if decay is not None and weight_decay is not None:
        with blamed_on("decay"):
            parameters = decay.split(module, weight_decay)
    elif decay is not None:
        rank_zero_info("The optimizer has no `weight_decay`, so its parameters are in one group.")
    with blamed_on("optimizer"):
        optimizer = make_optimizer(parameters)
    if make_scheduler is None:
        return optimizer
    with blamed_on("lr_scheduler"):
        scheduler = make_scheduler(optimizer)
    entry = {"scheduler": scheduler, "interval": interval or natural_interval(scheduler)}
    if hasattr(scheduler, "monitor"):
        entry["monitor"] = scheduler.monitor
    return {"optimizer": optimizer, "lr_scheduler": entry}
