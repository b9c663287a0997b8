"""The average of projected weights has a smaller norm than they have; where it is used, it is projected as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_normreg._compat import is_named
from lightning_normreg.callbacks._run import callbacks_of
from lightning_normreg.steps._projector import Projector

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from torch import Tensor, nn

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def find_averaging(trainer: Trainer, callback: object, wanted: bool) -> list[Any]:
    """Lightning's averaging callbacks of a Trainer; without ``wanted`` it is said what they do to norms."""
    callbacks = callbacks_of(trainer)
    found = [c for c in callbacks if is_named(c, *_AVERAGING)]
    names, mine = ", ".join(type(c).__name__ for c in found), type(callback).__name__
    if not wanted:
        if found:
            rank_zero_warn(
                f"{names} averages weights that {mine} holds, and an average of points on a sphere lies inside "
                "of it: where the averaged weights are used (validation, checkpoints, the end of the run), their norms "
                f"are below the radius. {mine}(project_averaged=True) puts them back."
            )
        return []
    if not found:
        raise ValueError(
            "`project_averaged` must have an average to project, but the Trainer has no WeightAveraging, "
            "EMAWeightAveraging or StochasticWeightAveraging among its callbacks. Leave it at False."
        )
    if callbacks.index(found[-1]) > callbacks.index(callback):
        raise ValueError(
            f"`project_averaged` must act on finished averages, but {names} comes after {mine}. Put "
            f"{mine} after it in `callbacks`."
        )
    return found


class AveragedWeights:
    """The targets of a projection in the averaged copy that a callback keeps of the module.

    The average itself goes on as it was: it is projected only for as long as somebody looks at it.
    """

    def __init__(self, averaging: Any, module: nn.Module, projector: Projector) -> None:
        copy: nn.Module = averaging._average_model.module
        twins = dict(zip(module.parameters(), copy.parameters(), strict=True))
        self._projector = projector
        self._targets = [
            replace(t, parameter=twins[t.parameter], joined=tuple(twins[p] for p in t.joined))
            for t in projector.targets
        ]
        mine = {p for target in self._targets for p in target.tensors()}
        self._tensors = {name: p for name, p in copy.named_parameters(remove_duplicate=False) if p in mine}
        self._average: dict[str, Tensor] = {}

    def project(self) -> None:
        """Put the averaged weights at their radius, until :meth:`restore`."""
        self._average = self.tensors()
        self._projector.place(self._targets)

    @torch.no_grad()
    def restore(self, average: Mapping[str, Tensor] | None = None) -> None:
        """Put the average back, or one that was saved."""
        for name, value in (self._average if average is None else average).items():
            self._tensors[name].copy_(value)
        self._average = {}

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the targets as they are, by their names in the module's ``state_dict``."""
        return {name: p.detach().clone() for name, p in self._tensors.items()}
