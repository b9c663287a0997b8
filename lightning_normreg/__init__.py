"""See and control what weight decay does to normalized networks, in PyTorch Lightning."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_normreg import functional as functional
    from lightning_normreg._optimizers import register_update_rule as register_update_rule
    from lightning_normreg._param_groups import DecayFreeLR as DecayFreeLR
    from lightning_normreg._param_groups import DecayGroupsMixin as DecayGroupsMixin
    from lightning_normreg._param_groups import accept_rescaled as accept_rescaled
    from lightning_normreg._param_groups import decay_groups as decay_groups
    from lightning_normreg._param_groups import rescale_ as rescale_
    from lightning_normreg._plot import plot_curves as plot_curves
    from lightning_normreg._reports import Plan as Plan
    from lightning_normreg._reports import plan as plan
    from lightning_normreg._symmetries import ReducedDecay as ReducedDecay
    from lightning_normreg._symmetries import Symmetries as Symmetries
    from lightning_normreg._symmetries import Symmetry as Symmetry
    from lightning_normreg._symmetries import find_scale_invariance as find_scale_invariance
    from lightning_normreg._symmetries import find_symmetries as find_symmetries
    from lightning_normreg._symmetries import load_verdict as load_verdict
    from lightning_normreg._symmetries import reduce_decay as reduce_decay
    from lightning_normreg._symmetries import save_verdict as save_verdict
    from lightning_normreg._weights import ParameterRole as ParameterRole
    from lightning_normreg._weights import ScaleInvariance as ScaleInvariance
    from lightning_normreg._weights import parameter_roles as parameter_roles
    from lightning_normreg.callbacks import CorrectedDecay as CorrectedDecay
    from lightning_normreg.callbacks import EffectiveLRMonitor as EffectiveLRMonitor
    from lightning_normreg.callbacks import NormProjection as NormProjection
    from lightning_normreg.callbacks import NormSummary as NormSummary
    from lightning_normreg.callbacks import RotationControl as RotationControl
    from lightning_normreg.callbacks import WeightNormMonitor as WeightNormMonitor
    from lightning_normreg.cli import NormRegCLI as NormRegCLI

__version__ = "0.1.0"

# Each name is imported when it is first used: formulas need no Lightning, and `--help` not even torch.
_ROOMS = {
    "_optimizers": "register_update_rule",
    "_param_groups": "DecayFreeLR DecayGroupsMixin accept_rescaled decay_groups rescale_",
    "_plot": "plot_curves",
    "_reports": "Plan plan",
    "_symmetries": (
        "ReducedDecay Symmetries Symmetry find_scale_invariance find_symmetries load_verdict reduce_decay save_verdict"
    ),
    "_weights": "ParameterRole ScaleInvariance parameter_roles",
    "callbacks": "CorrectedDecay EffectiveLRMonitor NormProjection NormSummary RotationControl WeightNormMonitor",
    "cli": "NormRegCLI",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = ["functional", *_ROOM_OF]  # noqa: PLE0604  # names, of which the type checker sees the imports above


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOM_OF, "functional"])


def __getattr__(name: str) -> Any:
    if name in ("functional", "steps"):
        return import_module(f"{__name__}.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    return globals()[name]


if sys.modules.get("pytorch_lightning") or sys.modules.get("lightning.pytorch"):
    # A command line finds callbacks by their short names only where their classes are there.
    import_module(f"{__name__}.callbacks")
