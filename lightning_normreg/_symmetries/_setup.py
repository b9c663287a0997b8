"""What the steps of one probe share."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lightning_normreg._symmetries._biases import bias_candidates
from lightning_normreg._symmetries._call import Call
from lightning_normreg._symmetries._euler import Draw, euler_draw
from lightning_normreg._symmetries._generic_point import AMOUNT, LADDER, magnitudes
from lightning_normreg._symmetries._losses import ProbeError
from lightning_normreg._symmetries._slices import axes
from lightning_normreg._symmetries._thresholds import THRESHOLDS
from lightning_normreg._weights import named_roles, same_memory, whole_shape

ATTEMPTS = 4
"""Points that are tried, closer and closer to the module's own, until the loss is finite."""


class Setup:
    """What the steps of one probe share. Names are those of ``module.named_parameters()``, unless they say clean."""

    def __init__(self, module: nn.Module, call: Call, *, seed: int, draws: int) -> None:
        named = named_roles(module)
        same = same_memory(module)
        distinct = {name: p for name, p in module.named_parameters() if same[p] is p}
        self.names = {name: (clean, role) for name, (clean, _, role) in zip(distinct, named, strict=True)}
        trainable = {name: p for name, p in distinct.items() if p.requires_grad}
        self.roles = {name: self.names[name][1] for name in trainable}
        self.shapes = {name: whole_shape(p) for name, p in trainable.items()}
        self.axes = {name: axes(shape, self.roles[name]) for name, shape in self.shapes.items()}
        self.biases = bias_candidates(self.roles, self.shapes)
        self.narrow = next((p.dtype for p in trainable.values()), torch.float32).to_real()
        self.call, self.limits = call, THRESHOLDS[call.dtype]
        self.seed, self.draws = seed, draws
        self._magnitudes = magnitudes(self.roles, draws, seed)

    def more_draws(self, draws: int) -> None:
        """So many points, of which the first are those that there were."""
        self.draws, self._magnitudes = draws, magnitudes(self.roles, draws, self.seed)

    def point(self, index: int, attempt: int = 0) -> tuple[dict[str, Tensor], int]:
        """Generic point number ``index`` and its seed; each further attempt stays closer to the module's own point."""
        magnitude = {name: m[index] if attempt == 0 else 1.0 for name, m in self._magnitudes.items()}
        return self._drawn(magnitude, index, attempt)

    def certificate_point(self, accepted: Collection[str], attempt: int) -> tuple[dict[str, Tensor], int]:
        """A point that no draw has used, at which the accepted weights are as large as any draw had them.

        Scale-invariant weights may have any size, so this is safe; clamps that a draw met by luck only are met here.
        """
        magnitude = {name: LADDER[-1] if name in accepted and attempt == 0 else 1.0 for name in self.roles}
        return self._drawn(magnitude, self.draws, attempt)

    def _drawn(self, magnitude: dict[str, float], index: int, attempt: int) -> tuple[dict[str, Tensor], int]:
        seed = (self.seed * 1009 + index) * ATTEMPTS + attempt
        return self.call.generic_point(magnitude, seed=seed, amount=AMOUNT / 4**attempt), seed

    def draw(self, index: int, ones: Sequence[str] = ()) -> Draw:
        """The Euler sums at one generic point at which the loss is finite.

        Raises:
            ProbeError: If it is not, however close to the module's own weights.
        """
        losses: list[float] = []
        for attempt in range(ATTEMPTS):
            point, seed = self.point(index, attempt)
            draw = euler_draw(self.call, point, self.axes, seed=seed, shrink=self.limits.shrink, ones=ones)
            finite = all(map(math.isfinite, draw.losses)) and all(bool(s.total.isfinite()) for s in draw.sums.values())
            if not self.call.largest(float(not finite)):
                return draw
            losses.extend(draw.losses)
        raise ProbeError(
            f"The loss and its gradient must be finite, but at {ATTEMPTS} points close to the module's weights the "
            f"loss was {', '.join(f'{loss:g}' for loss in losses)}. Check the batch for NaN and the loss for "
            "logarithms of zero."
        )
