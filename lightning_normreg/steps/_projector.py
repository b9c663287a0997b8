"""Holding the norm of every unit at a radius, after each real step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from lightning_normreg._optimizers import group_of, update_rule
from lightning_normreg._weights import Watched, at_once, norms_of
from lightning_normreg.functional._norms import root_mean_square
from lightning_normreg.functional._projection import check_radius
from lightning_normreg.steps._step_hooks import Phase, of_mine

Radius = float | Literal["auto", "initial"]

ASTRAY = 1e-4
"""Relative distance from the radius that is worth a warning, beyond what rounding explains."""


def check_radius_argument(radius: Radius) -> None:
    """Raise a ``ValueError`` unless ``radius`` is ``"auto"``, ``"initial"`` or a positive number."""
    if isinstance(radius, str):
        if radius not in ("auto", "initial"):
            raise ValueError(f"`radius` must be 'auto', 'initial' or a positive number, got {radius!r}.")
    else:
        check_radius(radius)


class Projector:
    """Projects targets when an optimizer has stepped them.

    Optimizer state is left alone: it was measured at the radius, and so will be the next gradient.
    """

    phase = Phase.PROJECT

    def __init__(self, targets: Sequence[Watched], radius: Radius, initial: Mapping[str, Tensor] | None = None) -> None:
        self.targets = list(targets)
        self._argument = radius
        self._by_parameter = {t.parameter: t for t in self.targets}
        self._radius = dict(initial or {})
        self._norms: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._starts: dict[str, Tensor] = {}
        self._stepped: set[str] = set()
        self._told: set[str] = set()
        self.looking = False
        """Whether the next report shall also say which weights were off their radius before the step."""

    @property
    def initial(self) -> dict[str, Tensor]:
        """Radii that were measured and so belong into a checkpoint; empty for the other kinds of radius."""
        return dict(self._radius) if self._argument == "initial" else {}

    def optimized(self, optimizers: Iterable[Optimizer]) -> list[Watched]:
        """Targets that these optimizers update, as their groups stand now."""
        return [target for target, _, _ in of_mine(optimizers, self._by_parameter)]

    @torch.no_grad()
    def project(self, targets: Iterable[Watched]) -> None:
        """Put targets at their radius."""
        targets = list(targets)
        self._prepare(targets)
        norms = at_once(lambda target, total: target.project_later(total, self._target(target)), targets)
        self._norms.update({target.name: found for target, found in zip(targets, norms, strict=True)})

    @torch.no_grad()
    def place(self, copies: Iterable[Watched]) -> None:
        """Put copies of targets at the radius of their originals."""
        at_once(lambda copy, total: copy.project_later(total, self._target(copy)), list(copies))

    @torch.no_grad()
    def start(self, targets: Sequence[Watched], optimizers: Iterable[Optimizer]) -> None:
        """Put targets at their radius for the first time, and let the state of optimizers under way follow.

        The state was measured at the old norms: gradients of a scale-invariant weight that is multiplied by c are
        multiplied by 1/c. After every later step the last gradient was measured at the radius, and so will be the next.
        """
        before = norms_of(targets)
        self.project(targets)
        self._norms.update({t.name: norms for t, norms in zip(targets, before, strict=True)})
        pairs = zip(norms_of(targets), before, strict=True)
        factors = [torch.where(old > 0, new / old, 1.0) for new, old in pairs]
        for optimizer in optimizers:
            mine = {t.name for t in self.optimized([optimizer])}
            for target, factor in zip(targets, factors, strict=True):
                if target.name in mine and all(optimizer.state.get(p) for p in target.tensors()):
                    _let_state_follow(optimizer, target, torch.where(factor.isfinite(), factor, 1.0))

    @torch.no_grad()
    def off(self, targets: Iterable[Watched]) -> list[Watched]:
        """Targets with a unit that is not at its radius. Reads the device."""
        targets = list(targets)
        self._prepare(targets)
        pairs = zip(targets, norms_of(targets), strict=True)
        return [t for t, norms in pairs if bool(((norms / self._target(t) - 1).abs() > self._band(t)).any())]

    def _band(self, target: Watched) -> float:
        """Relative distance from the radius within which a target counts as being there at the start."""
        return target.dead_band()

    def announce(self, targets: Sequence[Watched], optimizers: Iterable[Optimizer]) -> None:
        """Say by what factor projecting changes the effective learning rates, per optimizer. Reads the device."""
        norms = {t.name: found for t, found in zip(targets, norms_of(targets), strict=True)}
        for optimizer in optimizers:
            mine = {t.name for t in self.optimized([optimizer])}
            rules = [(t, update_rule(optimizer, group_of(optimizer, t.parameter))) for t in targets if t.name in mine]
            ratios = [
                float(root_mean_square(norms[target.name] / self._target(target))) ** rule.exponent
                for target, rule in rules
                if rule is not None and rule.exponent
            ]
            ratios = [r for r in ratios if r > 0 and math.isfinite(r)]
            if ratios and max(abs(r - 1) for r in ratios) > 1e-3:
                rank_zero_info(
                    f"NormProjection puts {len(ratios)} weights at their radius. The function stays, the recipe does "
                    f"not: their effective learning rates under {type(optimizer).__name__} change by factors of "
                    f"{min(ratios):.3g} (min), {median(ratios):.3g} (median), {max(ratios):.3g} (max), and from now on "
                    "the learning-rate schedule is the rotation schedule. radius='initial' changes neither."
                )

    def norms_and_radii(self) -> dict[str, tuple[float, float]]:
        """Root mean squares over units, of the norms before the last projection and of the radii. Reads the device."""
        found = {}
        now = norms_of(self.targets)
        for target, norms in zip(self.targets, now, strict=True):
            norms = self._norms.get(target.name, norms)  # noqa: PLW2901
            radius = root_mean_square(torch.ones_like(norms) * self._target(target))
            found[target.name] = (float(root_mean_square(norms)), float(radius))
        return found

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """See whether the weights are where the last projection has put them."""
        # Before the first step BatchNorm's gains may have followed the first projection, and be targets themselves.
        targets = [t for t in self.optimized([optimizer]) if t.name in self._stepped] if self.looking else []
        self._before = {t.name: norms for t, norms in zip(targets, norms_of(targets), strict=True)}

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Project what the optimizer has updated. A skipped update left the weights where projecting changes no bit."""
        self._starts.update(self._before)
        targets = self.optimized([optimizer])
        self._stepped.update(t.name for t in targets)
        self.project(targets)

    def report(self) -> None:
        """Warn once of units that cannot be projected, or do not stay where they were put. Reads the device once."""
        found = [(t, self._norms[t.name]) for t in self.targets if t.name in self._norms and t.name not in self._told]
        if not found:
            return
        device = found[0][1].device
        counts = [torch.stack([(n == 0).sum(), (~n.isfinite()).sum(), self._astray(t)]).to(device) for t, n in found]
        for (target, norms), (zero, wild, astray) in zip(found, torch.stack(counts).tolist(), strict=True):
            said = _why_off(target.name, len(norms), zero, wild, astray)
            if said:
                self._told.add(target.name)
                rank_zero_warn(said)

    def _astray(self, target: Watched) -> Tensor:
        """Number of units that were not at their radius before the last step that was looked at."""
        norms = self._starts.get(target.name)
        if norms is None:
            return self._norms[target.name].new_zeros((), dtype=torch.long)
        radius = torch.ones_like(norms) * self._target(target)
        possible = norms.isfinite() & (norms > 0) & radius.isfinite()
        return (possible & ((norms / radius - 1).abs() > target.dead_band() + ASTRAY)).sum()

    def _target(self, target: Watched) -> float | Tensor:
        if isinstance(self._argument, (int, float)):
            return self._argument
        return self._radius[target.name].to(target.parameter.device)

    def _prepare(self, targets: Sequence[Watched]) -> None:
        """Fix the radii of targets that have none yet; every process must ask for the same ones."""
        if isinstance(self._argument, (int, float)):
            return
        new = [target for target in targets if target.name not in self._radius]
        norms = norms_of(new) if self._argument == "initial" else [target.natural_norms() for target in new]
        for target, norm in zip(new, norms, strict=True):
            # A unit that is zero at the start has no radius to hold: infinity leaves it free.
            radius = norm if self._argument == "auto" else torch.where((norm > 0) & norm.isfinite(), norm, float("inf"))
            self._radius[target.name] = radius


def _why_off(name: str, units: int, zero: int, wild: int, astray: int) -> str:
    if zero or wild:
        what = " and ".join(
            [f"{zero} zero units"] * bool(zero) + [f"{wild} units with infinite or NaN entries"] * bool(wild)
        )
        return f"{name!r} has {what} of {units}: they have no direction and are left as they are."
    if astray:
        return (
            f"{name!r} does not stay at its radius: before the last step {astray} of {units} units were off it by more "
            "than rounding. Something else writes these weights after the optimizer's step (clipping, averaging, a "
            "copy that is loaded), or their type cannot hold the radius. Do that before the step, or leave them out by "
            "`exclude`."
        )
    return ""


def _let_state_follow(optimizer: Optimizer, target: Watched, factors: Tensor) -> None:
    rule = update_rule(optimizer, group_of(optimizer, target.parameter))
    known = rule is not None and rule.state_degrees is not None
    odd = [] if known else ["state"]
    for key, power in (rule.state_powers(target.parameter.ndim) if rule is not None else {}).items():
        entries = [optimizer.state[p].get(key) for p in target.tensors()]
        if all(isinstance(e, Tensor) and e.shape == p.shape for e, p in zip(entries, target.tensors(), strict=True)):
            target.multiply(factors**power, _StateOf(optimizer, key))
        elif any(entry is not None for entry in entries):
            odd.append(key)
    if odd:
        rank_zero_warn(
            f"The {odd[0]} of {type(optimizer).__name__} could not follow the first projection of {target.name!r}, as "
            "its shape or its rule is not known: its first steps are off until the state is renewed."
        )


class _StateOf:
    """An entry of an optimizer's state, as a function of the parameter."""

    def __init__(self, optimizer: Optimizer, key: str) -> None:
        self._optimizer, self._key = optimizer, key

    def __call__(self, parameter: Parameter) -> Tensor:
        entry: Tensor = self._optimizer.state[parameter][self._key]
        return entry
