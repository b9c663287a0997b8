"""Scale-invariant weights under pure noise: white gradients across the weight that go with 1/norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop

from lightning_normreg import functional as F
from tests import twins

EPS = 1e-30
"""Vanishes beside every root of a second moment here."""


FILLING = 700
"""Steps without moving: 7 times the memory of RMSprop's second moment, which is not corrected for its empty start."""


@dataclass(frozen=True)
class Case:
    """An optimizer under decay, and what the package needs to know of it.

    Attributes:
        family: Name in `functional`.
        make: Optimizer class.
        lr: Learning rate.
        weight_decay: Decay.
        settings: Further settings that both understand.
        options: Those that only the optimizer takes.
        shape: Of the weight; its units are the rows, and the whole for Muon and Adafactor.
        slack: What the prediction leaves out, as a share of norm and rotation.
    """

    family: Any
    make: Callable[..., Optimizer]
    lr: float
    weight_decay: float
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] = (16, 400)
    slack: float = 0.0

    @property
    def units(self) -> int:
        """Number of scale-invariant units."""
        return 1 if self.family in ("muon", "adafactor") else self.shape[0]

    @property
    def entries(self) -> int:
        """Entries of a unit."""
        return self.shape[0] * self.shape[1] // self.units

    def recipe(self) -> dict[str, Any]:
        """All settings of the package's functions, for unit gradients of variance 1 across the weight."""
        known: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, **self.settings}
        if self.family in ("sgd", "nesterov", "sgdp", "adam_l2", "rmsprop_l2"):
            known["gradient_norm"] = math.sqrt(self.entries - 1)
        if self.family in ("adam_l2", "rmsprop_l2", "adam_decoupled", "nadam_decoupled", "lion", "adamp", "lamb"):
            known["entries"] = self.entries
        if self.family == "muon":
            known["shape"] = self.shape
        return known


ADAFACTOR = Case("adafactor", Adafactor, 1e-2, 2e-2)
MOMENTUM = {"momentum": 0.9}
# The mean of g²/v̂ over entries is 1 − (1 − α), as v̂ holds g² itself with weight 1 − α; half of that for lengths.
RMSPROP: dict[str, Any] = {"options": {"eps": EPS, "alpha": 0.99}, "slack": 0.005}
# Newton–Schulz in bfloat16, 2^-8, and the Marchenko–Pastur law for a matrix that is not infinite, 1/rows².
MUON: dict[str, Any] = {"slack": 0.01}
CASES: dict[str, Case] = {
    "SGD": Case("sgd", SGD, 1.0, 1e-3),
    "SGD, large ηλ": Case("sgd", SGD, 1.0, 0.1),
    "momentum 0.9": Case("sgd", SGD, 1.0, 2e-4, MOMENTUM),
    "momentum 0.9, dampening 0.5": Case("sgd", SGD, 1.0, 4e-4, MOMENTUM | {"dampening": 0.5}),
    "Nesterov 0.9": Case("nesterov", SGD, 1.0, 2e-4, MOMENTUM, {"nesterov": True}),
    "AdamW": Case("adam_decoupled", AdamW, 1e-2, 0.1, {}, {"eps": EPS}),
    "AdamW, ηλ = 0.03": Case("adam_decoupled", AdamW, 1e-2, 3.0, {}, {"eps": EPS}),
    # The largest of many averages v̂, which scatter by sqrt(2(1 − β₂)/(1 + β₂)) = 3 %, is up to 8 % too large.
    "AMSGrad-W": Case("adam_decoupled", AdamW, 1e-2, 0.1, {}, {"eps": EPS, "amsgrad": True}, slack=0.04),
    "NAdamW": Case(
        "nadam_decoupled", NAdam, 1e-2, 0.1, {}, {"eps": EPS, "decoupled_weight_decay": True, "momentum_decay": 10.0}
    ),
    "Adam + L2": Case("adam_l2", Adam, 3e-3, 0.1, {}, {"eps": EPS}),
    "RMSprop + L2": Case("rmsprop_l2", RMSprop, 3e-3, 0.1, **RMSPROP),
    "RMSprop + L2, momentum 0.9": Case("rmsprop_l2", RMSprop, 3e-3, 1e-3, MOMENTUM, **RMSPROP),
    "Lion, ηλ = 1e-4": Case("lion", twins.Lion, 1e-2, 1e-2),
    "Lion, ηλ = 1e-3": Case("lion", twins.Lion, 1e-2, 1e-1, {"betas": (0.95, 0.98)}),
    "Muon 16 × 64": Case("muon", Muon, 1e-2, 0.1, shape=(16, 64), **MUON),
    "Muon 32 × 32": Case("muon", Muon, 1e-2, 0.1, {"momentum": 0.9}, shape=(32, 32), **MUON),
    "Muon 64 × 16": Case(
        "muon", Muon, 1e-2, 0.1, {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}, shape=(64, 16), **MUON
    ),
    "SGDP": Case("sgdp", twins.SGDP, 1.0, 1e-3, MOMENTUM),
    "AdamP": Case("adamp", twins.AdamP, 1e-2, 1.0),
    "LAMB": Case("lamb", twins.LAMB, 5e-3, 1e-1, {"betas": (0.9, 0.99)}, slack=0.01),
}


class Walk:
    """A weight that a case's optimizer moves under noise."""

    def __init__(self, case: Case, norm: float, seed: int) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(seed)
        start = self._by_unit(torch.randn(case.shape, dtype=torch.float64, generator=self.random))
        self.weight = nn.Parameter((norm * start / twins.rows(start)).view(case.shape))
        options = case.settings | case.options
        self.optimizer = case.make([self.weight], lr=0.0, weight_decay=case.weight_decay, **options)
        # The moments fill before the weight moves: an empty one is not what a long run has.
        for _ in range(FILLING):
            self.step()
        self.optimizer.param_groups[0]["lr"] = case.lr

    def _by_unit(self, x: Tensor) -> Tensor:
        return x.view(self.case.units, -1)

    def norms(self) -> Tensor:
        """Of every unit."""
        return self._by_unit(self.weight.detach()).norm(dim=1)

    def step(self) -> None:
        """One step of the optimizer under a new gradient."""
        w = self._by_unit(self.weight.detach())
        noise = torch.randn(w.shape, dtype=w.dtype, generator=self.random)
        self.weight.grad = (twins.across(noise, w) / twins.rows(w)).view(self.case.shape)
        self.optimizer.step()

    def run(self, steps: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Norm before, and cosine over, each step, for every unit."""
        for _ in range(steps):
            before, norms = self._by_unit(self.weight.detach()).clone(), self.norms()
            self.step()
            after = self._by_unit(self.weight.detach())
            yield norms, (before * after).sum(dim=1) / norms / after.norm(dim=1)


@dataclass(frozen=True)
class Result:
    """Measured over predicted, and how far chance may take that from 1.

    Attributes:
        norm: Root mean square norm over the predicted one.
        rotation: Angle whose cosine is the mean one, over the predicted one.
        norm_tolerance: For the first.
        rotation_tolerance: For the second.
    """

    norm: float
    rotation: float
    norm_tolerance: float
    rotation_tolerance: float


def at_equilibrium(case: Case, relaxations: float, seed: int = 0) -> Result:
    """Norm and rotation averaged over so many half-lives, after 4 that start at the predicted norm."""
    recipe = case.recipe()
    half_life = F.equilibrium_half_life(case.family, **recipe)
    walk = Walk(case, F.equilibrium_norm(case.family, **recipe), seed)
    for _ in walk.run(int(4 * half_life)):
        pass
    squares = cosines = 0.0
    steps = int(max(400, relaxations * half_life))
    for norms, cosine in walk.run(steps):
        squares += float((norms**2).mean())
        cosines += float(cosine.mean())
    tolerance = 3 * _standard_error(case, steps / half_life)
    exponent = 2 if case.family in ("sgd", "nesterov", "sgdp") else 1
    # Besides chance: terms in 1/C.
    rest = 2 / case.entries + case.slack
    return Result(
        math.sqrt(squares / steps) / F.equilibrium_norm(case.family, **recipe),
        math.acos(cosines / steps) / F.equilibrium_rotation(case.family, **recipe),
        tolerance + rest,
        exponent * tolerance + rest,
    )


def _standard_error(case: Case, half_lives: float) -> float:
    """Standard error of the mean norm, relative."""
    # The square of a norm of C numbers fluctuates by at most sqrt(2/C) of itself, if the numbers are independent and
    # nothing holds it, so the norm by half of that. Averages over e-folding times e, on either side, are independent:
    # T/(2e) of them for each unit, with e = half-life/ln 2.
    independent = case.units * half_lives * math.log(2) / 2
    return math.sqrt(2 / case.entries) / 2 / math.sqrt(independent)


def half_life(case: Case, seed: int = 0) -> tuple[float, float]:
    """Steps in which N^s comes half-way to equilibrium from 3 times the norm there, measured and predicted."""
    recipe = case.recipe()
    settled = F.equilibrium_norm(case.family, **recipe)
    predicted = F.equilibrium_half_life(case.family, initial_norm=3 * settled, **recipe)
    power = {"sgd": 4, "nesterov": 4, "sgdp": 4, "adam_l2": 3, "rmsprop_l2": 3, "lamb": 1}.get(case.family, 2)
    half_way = (3**power + 1) / 2 * settled**power
    walk = Walk(case, 3 * settled, seed)
    for step, (norms, _) in enumerate(walk.run(int(3 * predicted))):
        if float((norms**power).mean()) <= half_way:
            return step, predicted
    return math.inf, predicted
