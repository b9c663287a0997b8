"""The grid of one recipe as arrays, and what the trends are judged by."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from examples.van_laarhoven.estimates import Array, Mask
from examples.van_laarhoven.grid import Cell, Optimizer, Settings
from examples.van_laarhoven.model import CONSTANT_PART, MOMENTUM

SHORT = 1 / 8
"""A run is long enough for a cell if its norms relax within this share of the constant part."""
SMALL = 0.05
"""A decay is small if it takes away at most this share of a projected weight, or of Adam's gradient, per step."""


class Measured:
    """Optimizer and projection fixed: arrays over seeds, learning rates and decays (the first of which is 0).

    ``power`` is p: the effective rate is lr/‖w‖^p. In equilibrium ‖w‖ ∝ (lr/decay)^``norm_exponent`` ·
    G^``gradient_exponent``, with G the gradient at norm 1; the effective rate ∝ ``rate``^``rate_exponent`` if G is the
    same everywhere.
    """

    def __init__(self, settings: Settings, results: Mapping[Cell, Any], optimizer: Optimizer, projected: bool) -> None:
        self.optimizer, self.projected = optimizer, projected
        self.lrs, self.decays = np.array(settings.lrs(optimizer)), np.array(settings.decays(optimizer))
        cells = [
            [[results[Cell(optimizer, projected, lr, decay, seed)] for decay in settings.decays(optimizer)]
             for lr in settings.lrs(optimizer)]
            for seed in settings.seeds
        ]  # fmt: skip
        self._cells = cells
        first = cells[0][0][0]
        self.steps, self.entries = first["steps"], np.array(first["entries"], dtype=np.float64)
        self.logged = np.array(first["logged"])
        self.error: Array = np.array([[[cell["error"] for cell in row] for row in grid] for grid in cells])
        sgd = optimizer == "sgd"
        self.power = 2 if sgd else 1
        self.norm_exponent, self.rate_exponent, self.gradient_exponent = (1 / 4, 1 / 2, 1 / 2) if sgd else (1 / 3,) * 3
        self.rate = self.lrs[:, None] ** (3 - self.power) * self.decays
        self.rate_words = "lr·decay" if sgd else "lr²·decay"

    @property
    def log_error(self) -> Array:
        """Logarithm of the error, so that cells in which training fails do not decide alone; 0 counts as 0.05 %."""
        return np.log(np.maximum(self.error, 0.05))

    def curve(self, key: str) -> Array:
        """A logged curve, shape ``(S, L, D, layers, points)``."""
        return np.array([[[cell["curves"][key] for cell in row] for row in grid] for grid in self._cells])

    @cached_property
    def norm(self) -> Array:
        """Norm of a filter over the run: RMS over filters, geometric mean over layers; ``(S, L, D, points)``."""
        return np.exp(np.log(self.curve("unit_norm_rms")).mean(axis=3))

    @cached_property
    def effective_lr(self) -> Array:
        """Effective learning rate over the run, geometric mean over layers; ``(S, L, D, points)``."""
        with np.errstate(divide="ignore"):  # the schedule ends at 0
            return np.exp(np.log(self.curve("effective_lr")).mean(axis=3))

    @cached_property
    def constant(self) -> int:
        """Number of logged points in the constant part."""
        return int((self.logged < CONSTANT_PART * self.steps).sum())

    @cached_property
    def last_quarter(self) -> slice:
        """Points of the last quarter of the constant part."""
        return slice(int((self.logged < 0.75 * CONSTANT_PART * self.steps).sum()), self.constant)

    def settled_norm(self) -> Array:
        """Mean norm over the last quarter of the constant part, ``(S, L, D)``."""
        return self.norm[..., self.last_quarter].mean(axis=-1)

    def settled_rate(self) -> Array:
        """Mean effective rate over the last quarter of the constant part, ``(S, L, D)``."""
        return self.effective_lr[..., self.last_quarter].mean(axis=-1)

    def growth(self) -> Array:
        """Exponent d log‖w‖ / d log t over the last quarter of the constant part, ``(S, L, D)``: 0 is level."""
        quarter = self.last_quarter
        first, last = quarter.start, quarter.stop - 1
        steps = np.log((self.logged[last] + 1) / (self.logged[first] + 1))
        return np.log(self.norm[..., last] / self.norm[..., first]) / steps

    def _late(self, key: str, part: slice | None = None) -> Array:
        """Root mean square over the last quarter of the constant part, or another one, ``(S, L, D, layers)``."""
        return np.sqrt((self.curve(key)[..., part or self.last_quarter] ** 2).mean(axis=-1))

    def gradient_at_norm_1(self, part: slice | None = None) -> Array:
        """‖∇L‖·‖w‖ late in the constant part, or in another one, ``(S, L, D, layers)``."""
        return self._late("gradient_norm", part) * self._late("weight_norm", part)

    def removed(self) -> Array:
        """Share of the norm that decay takes away per step, geometric mean over seeds and layers, ``(L, D)``.

        SGD: lr·decay/(1 − momentum). Adam: lr·decay/σ with σ² the mean square of an entry of the gradient, measured.
        """
        if self.optimizer == "sgd":
            return self.rate / (1 - MOMENTUM)
        decay = self.decays[:, None]
        squares = self._late("gradient_norm") ** 2 + (decay * self._late("weight_norm")) ** 2
        sigma = np.sqrt(squares / self.entries)
        typical = np.exp(np.log(sigma).mean(axis=(0, 3)))
        return self.lrs[:, None] * self.decays / typical

    def gain(self) -> Array:
        """Factor by which decay raises the learning rate of projected SGD in the long run, ``(L, D)``; inf if unstable.

        Let the buffer be τ + r·w, with r = decay/(1 − m) for momentum m, and κ = lr·r. When w has turned by δ, r·w has
        the tangential part −r·δ, and δ = −lr·u/(1 − κ) for a tangential update u. So in the sums over a long time
        τ = m·(τ + κ/(1 − κ)·u) + g and, after Nesterov, u = g + m·τ; the rate is that of u/(1 − κ).
        """
        left = 1 - self.rate / (1 - MOMENTUM) * (1 - MOMENTUM + MOMENTUM**2) / (1 - MOMENTUM)
        return np.where(left > 0, 1 / np.where(left > 0, left, 1.0), np.inf)

    def long_enough(self) -> Mask:
        """Cells in which the norm relaxes, in 1/(4·removed) steps for SGD and 1/(3·removed) for Adam, in time."""
        times = 4 if self.optimizer == "sgd" else 3
        return np.asarray(times * self.removed() * SHORT * CONSTANT_PART * self.steps >= 1)

    def small_decay(self) -> Mask:
        """Cells whose decay should have next to no effect on projected weights, ``(L, D)``; from runs with projection.

        Adam divides by the size of the gradient with decay in it, so decay must be small beside the gradient: that of
        the same learning rate without decay, over the whole run, in the layer where it is smallest.
        """
        if self.optimizer == "sgd":
            return np.asarray(self.removed() <= SMALL)
        gradient, norm = (
            np.sqrt((self.curve(key)[:, :, 0] ** 2).mean(axis=(0, 3))) for key in ("gradient_norm", "weight_norm")
        )
        return np.asarray(self.decays[None, :] * (norm / gradient).max(axis=1)[:, None] <= SMALL)

    def settle_steps(self) -> tuple[Array, Array]:
        """Steps at which the norm is first within 10 % of its last mean, and from which on it stays, ``(S, L, D)``."""
        off = np.abs(np.log(self.norm[..., : self.constant] / self.settled_norm()[..., None])) > np.log(1.1)
        first = off.argmin(axis=-1)
        after_last_off = np.where(off.any(axis=-1), off.shape[-1] - off[..., ::-1].argmax(axis=-1), 0)
        return tuple(self.logged[np.minimum(k, self.constant - 1)] * 1.0 for k in (first, after_last_off))
