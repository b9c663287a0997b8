"""Signs of trouble in the numbers that are measured anyway, each told once, with the layer's name."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_normreg._weights import Table, listed
from lightning_normreg.functional._lengths import Lengths

OnUnhealthy = Literal["warn", "stop", "ignore"]

EXPLODED = 100.0
"""Times that a unit may be longer than the longest one was at first."""
_SHORT = 0.1
"""Units that start shorter than this have grown, and not exploded, while they are no longer than EXPLODED times it."""

SPIKE, LAST, FIRST = 10.0, 20, 10
"""Times the median of the last logged steps that an update may be large, over so many of them, from so many on."""

SIGNS = ("zero", "wild", "driven", "lost", "longest")


def signs(table: Table, norms: Tensor, lengths: Lengths | None = None, driven: Tensor | None = None) -> Tensor:
    """What a step shows of the units of each weight, in the order of ``SIGNS``; the device is not waited for.

    Args:
        table: The weights.
        norms: Norms of units before the step.
        lengths: What the step did to them.
        driven: Which units have a gradient that should move them.

    Returns:
        Shape ``(len(SIGNS), weights)``: how many units are zero, infinite or NaN before the step or after it, should
        move, and have not moved all the same; and the largest norm.
    """
    finite = norms.isfinite() if lengths is None else lengths.finite()
    none = torch.zeros_like(finite)
    driven = none if driven is None else driven & (norms > 0) & finite
    lost = none if lengths is None else driven & (lengths.update() == 0)
    counts = [table.totals(flags) for flags in (norms == 0, ~finite, driven, lost)]
    return torch.stack([*counts, table.extremes(torch.where(norms.isfinite(), norms, 0.0))[1]])


class Health:
    """Judges the weights of one tracker by their signs.

    Args:
        silent: Say nothing.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._first: dict[str, tuple[float, float]] = {}
        self._told: set[str] = set()
        self._spikes: dict[str, float] = {}
        self.sizes: dict[str, list[float]] = {}
        """Parameter → sizes of its last logged updates, over its learning rate and norm."""
        self.alarms: dict[str, str] = {}
        """Parameter → what is wrong with it; units that were zero from the start are not wrong."""

    def judge(self, name: str, numbers: Mapping[str, float], dtype: torch.dtype) -> None:
        """Take the signs of a step, as numbers."""
        first_zero, first_longest = self._first.setdefault(name, (numbers["zero"], numbers["longest"]))
        if numbers["zero"]:
            self.tell(
                f"zero {name}",
                f"{numbers['zero']:.0f} units of {name!r} are zero: they have no direction, so their rotation and "
                "relative update count as 0.",
            )
            if numbers["zero"] > first_zero:
                self.alarms[name] = "units became zero"
        if numbers["wild"]:
            self._alarm(
                name, "infinite or NaN entries", f"{name!r} has infinite or NaN entries, and so have its curves."
            )
        if numbers["longest"] > EXPLODED * max(first_longest, _SHORT):
            self._alarm(
                name,
                "exploding units",
                f"A unit of {name!r} has grown to norm {numbers['longest']:.3g}, from at most {first_longest:.3g} when "
                "logging began: its effective learning rate is gone. Lower the learning rate, warm it up, add decay, "
                "or hold the norm by NormProjection.",
            )
        if numbers["lost"] > numbers["driven"] / 2:
            self._alarm(
                name,
                "updates lost to rounding",
                f"{numbers['lost']:.0f} of {numbers['driven']:.0f} units of {name!r} with a gradient did not move in "
                f"a step: the update is below what {dtype} can add to the weight. Keep the weights in float32 (for "
                "example precision='bf16-mixed'), or raise the learning rate.",
            )

    def spike(self, name: str, size: float) -> float | None:
        """The size of an update over its median at the last logged steps; None in the first of them."""
        last = self.sizes.get(name, [])
        usual = median(last) if len(last) >= FIRST else 0.0
        self.sizes[name] = [*last, size][-LAST:]
        if not usual > 0:
            return None
        if size > SPIKE * usual and "update spike" not in self.alarms.get(name, ""):
            self.alarms[name] = "update spike"
            self._spikes[name] = size / usual
        return size / usual

    def tell_spikes(self) -> None:
        """Warn of spikes since the last call, of each weight's first one."""
        if self._spikes:
            self.tell(
                f"spike {[*self._spikes]}",
                f"In a step {listed([*self._spikes], 3)} turned up to {max(self._spikes.values()):.3g} times as far as "
                f"usual (median of the last {LAST} logged steps), their learning rate and norm allowed for. Spikes of "
                "updates may come before spikes of the loss: look at this batch, clip gradients, warm up for longer.",
            )
        self._spikes = {}

    def tell(self, topic: str, message: str) -> None:
        """Warn, unless the topic was warned about before."""
        if topic not in self._told and not self._silent:
            self._told.add(topic)
            rank_zero_warn(message)

    def _alarm(self, name: str, what: str, message: str) -> None:
        self.alarms[name] = what
        self.tell(f"{what} {name}", message)
