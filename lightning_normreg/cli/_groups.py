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
        """Both monitors."""
        shared = inspect.signature(WeightNormMonitor).parameters.keys() & self._kwargs.keys()
        norms = {name: self._kwargs[name] for name in shared}
        return [WeightNormMonitor(**norms, histograms=self._histograms), EffectiveLRMonitor(**self._kwargs)]


@final
class ProjectionGroup:
    """NormProjection: the norm of weights is held at a radius."""

    def __init__(self, **kwargs: Any) -> None:
        self._kwargs = kwargs

    def callbacks(self) -> list[CallbackBase]:
        """The projection."""
        return [NormProjection(**self._kwargs)]


@final
class RotationGroup:
    """RotationControl: weights turn by an angle per step, by default the learning rate in radians."""

    def __init__(self, **kwargs: Any) -> None:
        self._kwargs = kwargs

    def callbacks(self) -> list[CallbackBase]:
        """The control."""
        return [RotationControl(**self._kwargs)]


@final
class DecayGroup:
    """Decay by role in the parameter groups of --optimizer, where weights have its weight_decay."""

    def __init__(self, **kwargs: Any) -> None:
        self._kwargs = kwargs

    def split(self, module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups."""
        return decay_groups(module, weight_decay, **self._kwargs)


CALLBACK_GROUPS: dict[str, type[MonitorGroup] | type[ProjectionGroup] | type[RotationGroup]] = {
    "monitor": MonitorGroup,
    "projection": ProjectionGroup,
    "rotation": RotationGroup,
}
GROUP_OF_CALLBACK = {
    "EffectiveLRMonitor": "monitor",
    "WeightNormMonitor": "monitor",
    "NormProjection": "projection",
    "RotationControl": "rotation",
}
