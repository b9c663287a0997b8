"""How small is zero, for each kind of evidence."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Thresholds:
    """Bounds that follow from the roundoff u of the type and its amplification κ by the worst tensors.

    κ was measured on 58 architectures: at most 3e3, so the noise of z is at most 4e-13 in float64 and 3.4e-4 in
    float32. For a weight that is not scale-invariant P(z < t) is about t, so four draws below ``z`` have odds of
    1e-24 in float64 and 1e-12 in float32.

    Attributes:
        z: Units whose ``|Σ w·g| / √Σ (w·g)²`` stays below it in all draws are scale-invariant.
        inert: A tensor is inert whose ``√Σ (w·g)²`` stays below it, relative to the largest tensor, in all draws.
        shrink: Factor on every eps of a normalization, which then is below the roundoff of the variance.
        certificate: Largest relative change of the loss when all accepted units are rescaled at once. Measured: at
            most 1.4e-11 and 1.4e-5 for correct units, at least 5e-3 and 4e-4 when one wrong weight is among them.
    """

    z: float
    inert: float
    shrink: float
    certificate: float


THRESHOLDS: dict[torch.dtype, Thresholds] = {
    torch.float64: Thresholds(z=1e-6, inert=1e-9, shrink=1e-12, certificate=1e-8),
    torch.float32: Thresholds(z=1e-3, inert=2e-6, shrink=1e-6, certificate=1e-4),
}

OBSERVER_THRESHOLDS: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 3e-3, torch.float16: 3e-3}
"""For :func:`pooled_statistic` on gradients of training. Measured with 8 batches: scale-invariant weights stay below
9e-6 in float32 and 8e-4 in the narrow types, others are above 3e-3, all but 1 % of them above 2.5e-2."""
