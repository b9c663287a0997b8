"""The two names that Lightning goes by, `pytorch_lightning` and `lightning.pytorch`, and what both have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback as CallbackBase
else:

    def _callbacks() -> tuple[type, ...]:
        found = []
        for namespace in ("pytorch_lightning", "lightning.pytorch"):
            try:
                found.append(import_module(f"{namespace}.callbacks").Callback)
            except ModuleNotFoundError as error:
                if error.name is None or not namespace.startswith(error.name):
                    raise
        return tuple(dict.fromkeys(found))

    # A callback that derives from both classes is accepted by both Trainers and both command lines.
    CallbackBase = type("CallbackBase", _callbacks(), {"__module__": __name__})

__all__ = ["CallbackBase"]
