"""The two names that Lightning goes by, `pytorch_lightning` and `lightning.pytorch`, and what both have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback as CallbackBase
else:

    def _installed():
        found = []
        for namespace in ("pytorch_lightning", "lightning.pytorch"):
            try:
                found.append(import_module(namespace))
            except ModuleNotFoundError as error:
                if error.name is None or not namespace.startswith(error.name):
                    raise
        if not found:
            raise ModuleNotFoundError("Lightning is not installed. Install it by: pip install pytorch-lightning")
        return found

    # The first that is there; for what must be of one of the two.
    pl, *_others = _installed()
    # A callback that derives from both classes is accepted by both Trainers and both command lines.
    _callbacks = tuple(dict.fromkeys(module.Callback for module in (pl, *_others)))
    CallbackBase = type("CallbackBase", _callbacks, {"__module__": __name__})

__all__ = ["CallbackBase", "pl"]
