"""What may be missing: Lightning, under either of its two names, and optional packages."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback as CallbackBase

__all__ = ["CallbackBase", "is_named", "know_rank", "optional_import", "pl"]
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def know_rank() -> None:
    """Say which process this is where Lightning, which does so, is not imported: else every warning would raise."""
    if not hasattr(rank_zero_only, "rank"):
        rank_zero_only.rank = next((int(os.environ[key]) for key in _RANKS if key in os.environ), 0)  # type: ignore[attr-defined]


def is_named(thing: object, *names: str) -> bool:
    """Whether a thing's class, or one that it derives from, is known by one of these names.

    By name, because it may not be importable: it is of a package that is not installed, or of either of two.
    """
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def optional_import(module: str, extra: str = "plot") -> Any:
    """Import a module of an extra; where it is missing, the error has the line that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{module.partition(".")[0]} is not installed. Install it by: pip install "lightning-normreg[{extra}]"'
        ) from error


def __getattr__(name: str) -> Any:
    """Lightning when it is asked for: ``pl``, the first namespace that is there, and a base for callbacks of all."""
    if name not in ("pl", "CallbackBase"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    namespaces = []
    for namespace in ("pytorch_lightning", "lightning.pytorch"):
        try:
            namespaces.append(import_module(namespace))
        except ModuleNotFoundError as error:
            if error.name is None or not namespace.startswith(error.name):
                raise
    if not namespaces:
        raise ModuleNotFoundError("Lightning is not installed. Install it by: pip install pytorch-lightning")
    # A callback that derives from both classes is accepted by both Trainers and both command lines.
    callbacks = tuple(dict.fromkeys(module.Callback for module in namespaces))
    globals().update(pl=namespaces[0], CallbackBase=type("CallbackBase", callbacks, {"__module__": __name__}))
    return globals()[name]
