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
    """

    z: float  # units whose |Σ w·g| / √Σ (w·g)² stays below it in all draws are scale-invariant
    inert: float  # a tensor whose √Σ (w·g)² stays below it, relative to the largest tensor, in all draws, is inert
    shrink: float  # factor on every eps of a normalization, which then is below the roundoff of the variance
    # Largest relative change of the loss when all accepted units are rescaled at once. Measured: at most 1.4e-11 and
    # 1.4e-5 for correct units, at least 5e-3 and 4e-4 when one wrong weight is among them.
    certificate: float
    # Singular values of the Euler products of all tensors, of the largest, up to which they count as zero. Measured:
    # at most 1e-14 and 2e-6 for symmetries, at least 1e-4 for others.
    null: float
    fraction: float  # how far from a fraction of small numbers an exponent may be, where such are 1/30 apart


THRESHOLDS: dict[torch.dtype, Thresholds] = {
    torch.float64: Thresholds(z=1e-6, inert=1e-9, shrink=1e-12, certificate=1e-8, null=1e-9, fraction=1e-5),
    torch.float32: Thresholds(z=1e-3, inert=2e-6, shrink=1e-6, certificate=1e-4, null=2e-5, fraction=5e-3),
}


@dataclass(frozen=True)
class ObserverThresholds:
    """Bounds for what gradients of training show, whose noise is that of the type they are computed in."""

    # For pooled_statistic. Measured over 8 steps: scale-invariant weights stay below 9e-6 in float32 and 8e-4 in the
    # narrow types, others are above 3e-3, all but 1 % of them above 2.5e-2.
    statistic: float
    # A bias whose gradient, relative to that of its weight, stays below it is roundoff. Measured on 42 architectures:
    # at most 1.3e-7 in float32 and 5e-4 in bfloat16 in front of a normalization that takes the mean away, at least
    # 1.7e-2 elsewhere.
    live: float
    # Largest statistic at which units that were found scale-invariant still count as such: the eps share behind them
    # is some 10 % then.
    lost: float = 1e-2


WIDE_OBSERVER = ObserverThresholds(statistic=1e-4, live=1e-5)
NARROW_OBSERVER = ObserverThresholds(statistic=3e-3, live=3e-3)
"""For bfloat16 and float16, in autocast or throughout."""
