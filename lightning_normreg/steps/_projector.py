"""Holding the norm of every unit at a radius, after each real step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_normreg._optimizers import group_of, update_rule
from lightning_normreg._weights import Table, Watched, counted, in_words, listed, norms_of, share
from lightning_normreg.functional._projection import check_radius
from lightning_normreg.steps._step_hooks import by_parameter, of_mine
from lightning_normreg.steps._subscriber import Phase, StepSubscriber

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


class Projector(StepSubscriber):
    """Projects targets when an optimizer has stepped them.

    Optimizer state is left alone: it was measured at the radius, and so will be the next gradient.
    """

    phase = Phase.PROJECT

    def __init__(self, targets: Sequence[Watched], radius: Radius) -> None:
        super().__init__()
        self._argument = radius
        self._radius: dict[str, Tensor] = {}
        self._measured: set[str] = set()
        self._columns: dict[Table, Tensor] = {}
        self._norms: dict[Table, Tensor] = {}
        self._starts: dict[Table, Tensor] = {}
        self._before: dict[Table, Tensor] = {}
        self._free: set[Table] = set()
        self._stepped: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        self.looking = False
        """Whether the next report shall also say which weights were off their radius before the step."""
        self.aim(targets)

    def aim(self, targets: Sequence[Watched]) -> None:
        """Hold these from now on."""
        self.targets = list(targets)
        self._by_parameter = by_parameter(self.targets)

    def state_dict(self) -> dict[str, Any]:
        """Radii that were measured at the start; none for the other kinds of radius."""
        return {"initial": {name: radius.cpu() for name, radius in self._radius.items() if name in self._measured}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold the radii that were measured then."""
        self._radius |= state.get("initial", {})
        self._measured |= state.get("initial", {}).keys()

    def optimized(self, optimizers: Iterable[Optimizer]) -> list[Watched]:
        """Targets that these optimizers update, as their groups stand now; what is frozen may be in a group as well."""
        found = (target for target, _, _ in of_mine(optimizers, self._by_parameter) if target.parameter.requires_grad)
        return [*dict.fromkeys(found)]  # a set may be spread over several

    @torch.no_grad()
    def project(self, targets: Sequence[Watched]) -> None:
        """Put targets at their radius."""
        if targets:
            table = self.record.table(targets)
            radii = self._radii(table)
            if table in self._free:
                radii = self._take_up(table, table.norms().units)
            self._norms[table] = table.project(radii)

    @torch.no_grad()
    def place(self, copies: Sequence[Watched]) -> None:
        """Put copies of targets at the radius of their originals."""
        if copies:
            table = Table(copies)
            table.project(self._radii(table))

    @torch.no_grad()
    def start(
        self,
        targets: Sequence[Watched],
        optimizers: Iterable[Optimizer],
        twins: Sequence[tuple[Watched, Watched]] = (),
    ) -> None:
        """Put targets at their radius for the first time; copies and the state of optimizers under way follow.

        The state was measured at the old norms: gradients of a scale-invariant weight that is multiplied by c are
        multiplied by 1/c. After every later step the last gradient was measured at the radius, and so will be the next.
        """
        if not targets:
            return
        table = self.record.table(targets)
        before = table.norms().units
        self.project(targets)
        self._norms[table] = before
        factor = torch.where(before > 0, table.norms().units / before, 1.0)
        factors = dict(zip(targets, table.split(torch.where(factor.isfinite(), factor, 1.0)), strict=True))
        for target, twin in twins:
            Table([twin]).scale(factors[target])
        for optimizer in optimizers:
            mine = [target for target in self.optimized([optimizer]) if target in factors]
            for one, factor in [(one, factors[target]) for target in mine for one in target.members or (target,)]:
                if all(optimizer.state.get(p) for p in one.tensors()):
                    _let_state_follow(optimizer, one, factor.expand(one.units()))

    @torch.no_grad()
    def off(self, targets: Sequence[Watched]) -> list[Watched]:
        """Targets with a unit that is not at its radius. Reads the device."""
        if not targets:
            return []
        table = self.record.table(targets)
        radii = self._radii(table)
        apart = (table.norms().units / radii - 1).abs().masked_fill(radii.isinf(), 0.0)
        flags = table.totals(apart > table.column([self._band(t) for t in targets])).tolist()
        return [target for target, flag in zip(targets, flags, strict=True) if flag]

    def _band(self, target: Watched) -> float:
        """Relative distance from the radius within which a target counts as being there at the start."""
        return target.dead_band()

    def announce(self, targets: Sequence[Watched], optimizers: Iterable[Optimizer]) -> None:
        """Say by what factor projecting changes the effective learning rates, per optimizer. Reads the device."""
        if not targets:
            return
        table = self.record.table(targets)
        far = table.root_mean_squares(table.norms().units / self._radii(table)).tolist()
        distances = {t.name: distance for t, distance in zip(targets, far, strict=True)}
        for optimizer in optimizers:
            mine = {t.name for t in self.optimized([optimizer])}
            rules = [(t, update_rule(optimizer, group_of(optimizer, t.parameter))) for t in targets if t.name in mine]
            moved = {t: distances[t.name] ** rule.exponent for t, rule in rules if rule is not None and rule.exponent}
            moved = {target: ratio for target, ratio in moved.items() if ratio > 0 and math.isfinite(ratio)}
            ratios = [*moved.values()]
            if ratios and max(abs(r - 1) for r in ratios) > 1e-3:
                spread = [f"{ratio:.3g}" for ratio in (min(ratios), median(ratios), max(ratios))]
                by = f"factors of {spread[0]} (min), {spread[1]} (median), {spread[2]} (max)"
                rank_zero_info(
                    f"NormProjection puts {in_words([*moved])} at the radius, which changes the "
                    f"recipe: effective learning rates under {type(optimizer).__name__} change by "
                    f"{by if len(set(spread)) > 1 else f'a factor of {spread[0]}'}, and from now on "
                    "the learning-rate schedule is the rotation schedule. radius='initial' changes neither."
                )

    def norms_and_radii(self) -> dict[str, tuple[float, float]]:
        """Root mean squares over units, of the norms before the last projection and of the radii. Reads the device.

        The radius is that of the units which have one by now, NaN where none has.
        """
        trained = [target for target in self.targets if target.parameter.requires_grad]
        if not trained:
            return {}
        table = self.record.table(trained)
        radii = self._radii(table)
        held = radii.isfinite()
        means = (table.totals(radii.masked_fill(~held, 0.0).square()) / table.totals(held)).sqrt()
        found = zip(table.root_mean_squares(table.norms().units).tolist(), means.tolist(), strict=True)
        pairs = dict(zip([t.name for t in trained], found, strict=True))
        for other, norms in self._norms.items():
            # A process has those of its units, and of all that have been shared.
            mine = torch.stack([norms.masked_fill(~other.present, 0.0), other.present.to(norms.dtype)])
            (sums,) = share([(other, torch.nn.functional.pad(mine, (0, len(other.sizes))))])
            everywhere = (sums[0] / sums[1].clamp_min(1))[: len(norms)]
            before = zip(other.watched, other.root_mean_squares(everywhere).tolist(), strict=True)
            pairs |= {w.name: (norm, pairs[w.name][1]) for w, norm in before if w.name in pairs}
        return pairs

    def before_step(self, index: int, optimizer: Optimizer) -> None:
        """See whether the weights are where the last projection has put them."""
        # Before the first step BatchNorm's gains may have followed the first projection, and be targets themselves.
        targets = [t for t in self.optimized([optimizer]) if t.name in self._stepped] if self.looking else []
        table = self.record.table(targets) if targets else None
        self._before = {} if table is None else {table: table.norms().units}

    def after_step(self, index: int, optimizer: Optimizer, skipped: Tensor | None) -> None:
        """Project what the optimizer has updated. A skipped update left the weights where projecting changes no bit."""
        self._starts.update(self._before)
        targets = self.optimized([optimizer])
        self._stepped.update(t.name for t in targets)
        self.project(targets)

    def report(self) -> None:
        """Warn once of units that cannot be projected, or do not stay where they were put. Reads the device once."""
        counts: dict[str, list[int]] = {}
        for table, norms in self._norms.items():
            mine = norms.new_tensor(0.0).expand(len(table.sizes))
            flags = [(norms == 0) & table.present, ~norms.isfinite()]
            found = torch.stack([*(table.totals(flag) for flag in flags), mine]).T.long().tolist()
            counts |= {w.name: numbers for w, numbers in zip(table.watched, found, strict=True)}
        for table, norms in self._starts.items():
            astray = table.totals(self._astray(table, norms)).long().tolist()
            for w, number in zip(table.watched, astray, strict=True):
                counts[w.name][2] = number
        self._free = {table for table in self._free if bool(self._columns[table].isinf().any())}
        held = [target for target in self.targets if target.name in counts]
        for place, (kind, remedy) in enumerate(_WHY_OFF.items()):
            new = [t for t in held if counts[t.name][place] and (t.name, kind) not in self._told]
            self._told.update((t.name, kind) for t in new)
            if new:
                what = [f"{t.name!r} has {counted(counts[t.name][place], kind)} of {t.units()}" for t in new]
                rank_zero_warn(f"{listed(what, 5)}{remedy}")

    def _astray(self, table: Table, norms: Tensor) -> Tensor:
        """Which units were not at their radius before the last step that was looked at."""
        radius = self._radii(table)
        possible = norms.isfinite() & (norms > 0) & radius.isfinite()
        bands = table.column([w.dead_band() + ASTRAY for w in table.watched])
        return possible & ((norms / radius - 1).abs() > bands)

    def _radii(self, table: Table) -> Tensor:
        """Radius of each unit; that of weights which have none yet is fixed now, so every process must ask."""
        if table not in self._columns:
            if isinstance(self._argument, (int, float)):
                radii = table.column([float(self._argument)] * len(table.watched))
            else:
                new = [w for w in table.watched if w.name not in self._radius]
                measured = [w for w in new if self._argument == "initial" or w.members]
                self._measured |= {w.name for w in measured}
                norms = dict(zip(measured, norms_of(measured), strict=True))
                for w in new:
                    norm = norms[w] if w in norms else w.natural_norms()
                    # A unit that is zero at the start has no radius yet: infinity leaves it free.
                    held = (norm > 0) & norm.isfinite()
                    self._radius[w.name] = torch.where(held, norm, float("inf"))
                radii = torch.cat([self._radius[w.name].to(table.device, table.dtype) for w in table.watched])
                if bool(radii.isinf().any()):
                    self._note_free(table, radii)
            self._columns[table] = radii
        return self._columns[table]

    def _note_free(self, table: Table, radii: Tensor) -> None:
        self._free.add(table)
        found = zip(table.watched, table.totals(radii.isinf()).tolist(), strict=True)
        new = [w.name for w, number in found if number and (w.name, "free") not in self._told]
        self._told.update((name, "free") for name in new)
        if new:
            rank_zero_info(
                f"Zero at the start, or in part: {listed(new, 5)}. Such units have no norm to hold: they are held at "
                "the one that their first update gives them. A number as `radius` is used at once; `exclude` leaves "
                "them free."
            )

    def _take_up(self, table: Table, norms: Tensor) -> Tensor:
        """Radii, when units that had none have come to have a norm."""
        radii = self._columns[table]
        radii = torch.where(radii.isinf() & (norms > 0) & norms.isfinite(), norms, radii)
        self._columns[table] = radii
        self._radius.update(zip((w.name for w in table.watched), table.split(radii), strict=True))
        return radii


_WHY_OFF = {
    "zero unit": ": it has no direction and is left as it is, until an update gives it one for the radius.",
    "non-finite unit": ": with infinite or NaN entries it has no direction and is left as it is.",
    "displaced unit": (
        ": it does not stay at its radius, but was off it by more than rounding before the last step. Something else "
        "writes these weights after the optimizer's step (clipping, averaging, a copy that is loaded), or their type "
        "cannot hold the radius. Do that before the step, or leave them out by `exclude`."
    ),
}


def _let_state_follow(optimizer: Optimizer, target: Watched, factors: Tensor) -> None:
    rule = update_rule(optimizer, group_of(optimizer, target.parameter))
    known = rule is not None and rule.state_degrees is not None
    odd = [] if known else ["state"]
    for key, power in (rule.state_powers(target.parameter.ndim) if rule is not None else {}).items():
        entries = [optimizer.state[p].get(key) for p in target.tensors()]
        if all(isinstance(e, Tensor) and e.shape == p.shape for e, p in zip(entries, target.tensors(), strict=True)):
            Table([target]).scale(factors**power, dict(zip(target.tensors(), entries, strict=True)).__getitem__)
        elif any(entry is not None for entry in entries):
            odd.append(key)
    if odd:
        rank_zero_warn(
            f"The {odd[0]} of {type(optimizer).__name__} could not follow the first projection of {target.name!r}, as "
            "its shape or its rule is not known: its first steps are off until the state is renewed."
        )
