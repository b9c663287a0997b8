"""The argument groups ``--monitor``, ``--projection``, ``--rotation`` and ``--decay``: what they take, and make.

Their arguments are those of the classes and the function that they call; the command line finds them out from the code.
"""

from __future__ import annotations

import inspect
from typing import Any, final

from torch import nn

from lightning_normreg._compat import CallbackBase
from lightning_normreg._param_groups import decay_groups
from lightning_normreg.callbacks._effective_lr_monitor import EffectiveLRMonitor
from lightning_normreg.callbacks._norm_projection import NormProjection
from lightning_normreg.callbacks._rotation_control import RotationControl
from lightning_normreg.callbacks._weight_norm_monitor import WeightNormMonitor


class _Arguments:
    """Keeps arguments for the call that a subclass makes with them: jsonargparse finds there which they are."""

    def __init__(self, **kwargs: Any) -> None:
        self._kwargs = kwargs


@final
class MonitorGroup:
    """EffectiveLRMonitor, and WeightNormMonitor with what it shares of the arguments.

    Args:
        histograms: Write histograms of the norms of each weight's units as well.
    """

    def __init__(self, histograms: bool = False, **kwargs: Any) -> None:
        self._histograms = histograms
        self._kwargs = kwargs

    def callbacks(self) -> list[CallbackBase]:
        shared = inspect.signature(WeightNormMonitor).parameters.keys() & self._kwargs.keys()
        norms = {name: self._kwargs[name] for name in shared}
        return [WeightNormMonitor(**norms, histograms=self._histograms), EffectiveLRMonitor(**self._kwargs)]


@final
class ProjectionGroup(_Arguments):
    """NormProjection: the norm of weights is held at a radius."""

    def callbacks(self) -> list[CallbackBase]:
        return [NormProjection(**self._kwargs)]


@final
class RotationGroup(_Arguments):
    """RotationControl: weights turn by an angle per step, by default the learning rate in radians."""

    def callbacks(self) -> list[CallbackBase]:
        return [RotationControl(**self._kwargs)]


@final
class DecayGroup(_Arguments):
    """Decay by role in the parameter groups of --optimizer, where weights have its weight_decay."""

    def split(self, module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(module, weight_decay, **self._kwargs)


CALLBACK_GROUPS: dict[str, tuple[Any, bool, str]] = {
    "monitor": (
        MonitorGroup,
        True,
        "Log effective learning rates, rotations and norms: true, false, or with arguments such as "
        "--monitor.every_n_steps 10. A monitor named in trainer.callbacks takes the place of this one.",
    ),
    "projection": (
        ProjectionGroup,
        False,
        "Hold the norm of scale-invariant weights: true, false, or with arguments such as --projection.radius 1.0.",
    ),
    "rotation": (
        RotationGroup,
        False,
        "Turn scale-invariant weights by an angle per step, the learning rate in radians: true, false, or with "
        "arguments such as --rotation.angle 0.01 or --rotation.angle equilibrium.",
    ),
}
"""By key: what makes the callbacks, whether it is there by default, and its help."""
GROUP_OF_CALLBACK = {
    "EffectiveLRMonitor": "monitor",
    "WeightNormMonitor": "monitor",
    "NormProjection": "projection",
    "RotationControl": "rotation",
}
