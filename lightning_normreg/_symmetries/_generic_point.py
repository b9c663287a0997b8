"""Points at which a weight that is not scale-invariant has no chance to look so.

At a fresh initialization biases, gains and whole branches are zero, and eps may dominate a variance: weights look
scale-invariant there that are not, and the other way round. Scale invariance is an identity in the weights, so it may
be tested anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

LADDER = (0.5, 1.0, 3.0, 8.0)
"""Magnitudes relative to 1/√fan_in, so that clamps (ReLU6) and saturations are visited."""

AMOUNT = 0.1
"""Standard deviation of the noise relative to the entries; twice that, absolutely, for vectors."""


def magnitudes(names: Iterable[str], draws: int, seed: int) -> dict[str, list[float]]:
    """For each tensor its magnitude in every draw: all of the ladder, each in its own order."""
    generator = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(len(LADDER), generator=generator).tolist() for name in names}
    return {name: [LADDER[order[k % len(LADDER)]] for k in range(draws)] for name, order in orders.items()}


def generic_point(
    tensors: Mapping[str, Tensor],
    magnitude: Mapping[str, float],
    dtype: torch.dtype,
    *,
    seed: int,
    amount: float = AMOUNT,
    shapes: Mapping[str, torch.Size] | None = None,
) -> dict[str, Tensor]:
    """Draw every tensor anew, close to where it is but away from all special values.

    A vector p becomes ``p + 2·amount·n``, n standard normal. Anything else is brought to the root mean square
    r = magnitude/√fan_in and becomes ``p + amount·√(p² + r²)·n``; an all-zero tensor is drawn from ``n·r``. The result
    is in ``dtype``, or the complex type of that width; each device draws from a stream of its own. Parts of tensors
    have the ``shapes`` of the whole ones, and are drawn each by itself.
    """
    generators: dict[torch.device, torch.Generator] = {}
    point = {}
    for name, tensor in tensors.items():
        generator = generators.setdefault(tensor.device, torch.Generator(tensor.device).manual_seed(seed))
        wide = tensor.detach().to(dtype.to_complex() if tensor.is_complex() else dtype, copy=True)
        point[name] = _redraw(wide, shapes[name] if shapes else wide.shape, magnitude[name], amount, generator)
    return point


def _redraw(tensor: Tensor, shape: torch.Size, magnitude: float, amount: float, generator: torch.Generator) -> Tensor:
    # Single precision is generic enough, and drawing is a good part of the probe's cost.
    narrow = torch.complex64 if tensor.is_complex() else torch.float32
    noise = torch.randn(tensor.shape, generator=generator, dtype=narrow, device=tensor.device)
    if len(shape) <= 1:
        return tensor.add_(noise, alpha=2 * amount)
    fan_in = max(1, shape[1:].numel())
    rms = magnitude / math.sqrt(fan_in)
    actual = float(torch.linalg.vector_norm(tensor)) / math.sqrt(max(1, tensor.numel()))
    if actual < 1e-3 / math.sqrt(fan_in):  # zero or a tiny layer scale: there is no direction to keep
        return noise.to(tensor.dtype).mul_(rms)
    tensor.mul_(rms / actual)
    spread = (tensor * tensor.conj()).real.add_(rms**2).sqrt_()
    return tensor.addcmul_(noise, spread, value=amount)
