"""The plan of a run: norms and rotations that follow from norms at the start and the recipe alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_normreg import _metrics
from lightning_normreg._compat import optional_import
from lightning_normreg._optimizers import Group, NoRule, UpdateRule
from lightning_normreg._reports._plan_words import PlannedUnit, count, sentence, words_of
from lightning_normreg._weights import Watched, listed
from lightning_normreg.functional._norms import root_mean_square
from lightning_normreg.steps._formulas import Formulas, Rates

if TYPE_CHECKING:
    import os

    import pandas as pd
    from torch import Tensor

POINTS = 120
"""Steps at which a plan has numbers are so many, evenly spread, and so many more that get denser towards the start."""
LARGEST_DECAY, LARGEST_ROTATION, FORGOTTEN = 1e-3, 0.022, 2.0
"""Up to where units of several rows or tensors were within 15 % of the prediction in small transformers: lr·decay, the
rotation of a step, and relaxation times, after which there are no numbers any more."""

_CURVES = {
    _metrics.UNIT_NORM_RMS: "norm",
    _metrics.ROTATION: "rotation",
    _metrics.EFFECTIVE_LR: "effective_lr",
    _metrics.EQUILIBRIUM_NORM: "equilibrium_norm",
    _metrics.EQUILIBRIUM_ROTATION: "equilibrium_rotation",
}


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to the norms and rotations of scale-invariant weights, as :func:`plan` predicts it.

    Attributes:
        steps: Optimizer steps of the run.
        at: Steps at which there are numbers, from 0 on.
        units: By name of a weight or set what is planned for it.
        refused: By name what cannot be planned, and why.
        covered: How many tensors are in the units, and how many in all that was asked for.
    """

    steps: int
    at: list[int]
    covered: tuple[int, int]
    units: dict[str, PlannedUnit] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """What it means: when decay comes to balance, where rotations peak, over how much of the run decay acts."""
        said: dict[str, list[str]] = {}
        for name, unit in self.units.items():
            for words in words_of(unit, self.at, self.steps):
                said.setdefault(words, []).append(name)
        for name, why in self.refused.items():
            said.setdefault(f"Not planned: {{}}. {why}", []).append(name)
        some, of = self.covered
        together = f", which are {some} of {of} tensors" if some != of else ""
        first = f"Planned: {listed([*self.units], 3)}{together}." if self.units else "Nothing of it can be planned."
        return [first, *(words.format(listed(names, 3)) for words, names in said.items())]

    def at_step(self, name: str, key: str, step: float) -> float:
        """A planned number between two of the steps, interpolated; NaN beyond the end."""
        return float(np.interp(step, self.at, getattr(self.units[name], key), right=math.nan))

    def typical_rotation(self, name: str) -> float:
        """Median over the run of the planned rotation of a weight."""
        rotations = np.interp(range(self.steps), self.at, self.units[name].rotation)
        return float(np.nanmedian(rotations))

    def to_frame(self) -> pd.DataFrame:
        """As a monitor's ``history()``, so that :func:`plot_curves` draws it.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        columns = {
            _metrics.tag(curve, name, ""): getattr(unit, key)
            for curve, key in _CURVES.items()
            for name, unit in self.units.items()
        }
        frame: pd.DataFrame = optional_import("pandas").DataFrame({"step": self.at, **columns})
        return frame.dropna(axis=1, how="all")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON: None where there is no number."""
        return {"plan": 1, **asdict(self, dict_factory=lambda items: {k: _plain(v) for k, v in items})}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, which ``EffectiveLRMonitor(plan=...)`` and ``plot --plan`` read."""
        Path(path).write_text(json.dumps(self.to_dict(), allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any] | Plan) -> Plan:
        """Read what :meth:`save` has written, or what :meth:`to_dict` gives.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no plan.
        """
        if isinstance(source, Plan):
            return source
        content: Any = source
        if not isinstance(source, Mapping):
            try:
                content = json.loads(Path(source).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"`plan` must be a file of `lightning-normreg plan --save`: {error}.") from error
        try:
            names = [f.name for f in fields(PlannedUnit)]
            units = {
                name: PlannedUnit(**{key: _numbers(unit[key]) for key in names})
                for name, unit in content["units"].items()
            }
            some, all_of_them = content["covered"]
            at = [int(step) for step in content["at"]]
            return cls(int(content["steps"]), at, (some, all_of_them), units, dict(content["refused"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError("`plan` must be a file of `lightning-normreg plan --save`, got something else.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [math.nan if entry is None else float(entry) for entry in value]
    return math.inf if value is None else value


def points(steps: int) -> list[int]:
    """Steps at which a plan of some length has numbers."""
    even = {round(i * (steps - 1) / (POINTS - 1)) for i in range(POINTS)}
    return sorted(even | {round(steps ** (i / POINTS)) - 1 for i in range(POINTS)})


def plan_of(
    watched: Sequence[tuple[Watched, Tensor]],
    owners: Mapping[str, tuple[UpdateRule | NoRule | None, Group, Sequence[Rates]]],
    steps: int,
    *,
    refused: Mapping[str, str],
    held: Mapping[str, float] = MappingProxyType({}),
) -> Plan:
    """The plan of some weights and sets, each with the norms of its units.

    ``owners`` has of each the rule of its optimizer, the settings of its group, and learning rate and decay of all
    steps; ``held`` the radius of what a projection holds.
    """
    at = points(steps)
    units: dict[str, PlannedUnit] = {}
    why: dict[str, str] = {}
    for one, norms in watched:
        rule, group, rates = owners.get(one.name, (None, {}, ()))
        try:
            if one.name in refused:
                raise ValueError(refused[one.name])
            formulas = _formulas(one, rule, group, rates)
            norm = held.get(one.name, float(root_mean_square(norms)))
            if not 0 < norm < math.inf:
                raise ValueError(f"Its norm at the start is {norm:g}, from where no course follows.")
            is_held = one.name in held
            several = not is_held and (bool(one.members) or any(part.size(one.shape) > 1 for part in one.parts))
            units[one.name] = _Course(formulas, rates, is_held, several).follow(norm, at)
        except ValueError as error:
            why[one.name] = sentence(str(error))
    inside = {p for one, _ in watched if one.name in units for p in one.tensors()}
    return Plan(steps, at, (len(inside), len({p for one, _ in watched for p in one.tensors()})), units, why)


def _formulas(one: Watched, rule: UpdateRule | NoRule | None, group: Group, rates: Sequence[Rates]) -> Formulas:
    """The formulas of a weight; a ``ValueError`` says why no course follows from them, or none that is near enough."""
    if not isinstance(rule, UpdateRule) or not rule.family:
        raise ValueError("What its optimizer does to norms is not known.")
    if rule.family == "adam_l2" and not any(decay for _, decay in rates):
        rule = replace(rule, family="adam_decoupled")  # without decay they are one
    formulas = Formulas(rule, group, one, None)
    family = formulas.family
    if "gradient_norm" in family.settings:
        raise ValueError(
            f"Under {family.name!r} norms depend on the size of gradients, which changes as it trains."
            + _balance(formulas, rates)
        )
    if family.name in ("lion", "muon"):
        raise ValueError(
            f"Under {family.name!r} norms depend on how much of the gradients is signal, by up to 35 % in what was "
            f"measured.{_balance(formulas, rates)}"
        )
    if family.name != "adam_decoupled" or rule.local != "adam" or group.get("amsgrad"):
        raise ValueError("How near predictions for its optimizer are has been measured for Adam and AdamW alone.")
    memory = 1 / (1 - group.get("betas", (0.9, 0.999))[1])
    if len(rates) < 2 * memory:
        raise ValueError(
            f"A run of {count(len(rates))} steps is too short against the {memory:.0f} that the second moment "
            "remembers."
        )
    return formulas


def _balance(formulas: Formulas, rates: Sequence[Rates]) -> str:
    """What is known all the same: the rotation at which decay settles, at the highest learning rate."""
    try:
        lr, decay = max(rates)
        return (
            f" Where decay has come to balance, it turns by {formulas.rotation((lr, decay)):.2g} a step at lr {lr:g}."
        )
    except ValueError:  # without decay, or where that depends on gradients too
        return ""


@dataclass(frozen=True)
class _Course:
    """The way of one weight."""

    formulas: Formulas
    rates: Sequence[Rates]
    held: bool
    several: bool  # whether a unit has several rows or tensors

    def follow(self, norm: float, at: Sequence[int]) -> PlannedUnit:
        rows, relaxed, here = [], 0.0, 0
        for step in at:
            if not self.held:
                norm, more = self.formulas.advance(norm, self.rates[here:step])
                relaxed, here = relaxed + more, step
            now = (norm, *self._now(norm, self.rates[step]))
            if self.several:
                self._check(now[1], self.rates[step])
                if relaxed > FORGOTTEN:
                    now = (math.nan, math.nan, math.nan, *now[3:])
            rows.append((*now, relaxed))
        shares = sum(lr * decay for lr, decay in self.rates)
        columns = [list(column) for column in zip(*rows, strict=True)]
        kept: dict[str, Any] = dict(zip((f.name for f in fields(PlannedUnit)), columns, strict=False))
        return PlannedUnit(**kept, timescale=1 / shares if shares > 0 else math.inf)

    def _check(self, rotation: float, rates: Rates) -> None:
        """Refuse what small transformers were measured to be further off in."""
        decay = rates[0] * rates[1]
        if decay > 1.0001 * LARGEST_DECAY or rotation > LARGEST_ROTATION:
            raise ValueError(
                "Where a unit has several rows or tensors, Adam lets the loss move norm between them. They are as "
                f"planned up to lr·decay = {LARGEST_DECAY:g} and {LARGEST_ROTATION:g} rad a step, which come to "
                f"{decay:.2g} and {rotation:.2g} here."
            )

    def _now(self, norm: float, rates: Rates) -> tuple[float, float, float, float]:
        """Rotation, effective learning rate, norm and rotation at equilibrium."""
        lr, decay = rates
        if lr == 0:
            return 0.0, 0.0, math.nan, math.nan
        settles = decay > 0 and self.formulas.family.settles and not self.held
        balance = (self.formulas.norm(rates), self.formulas.rotation(rates)) if settles else (math.nan, math.nan)
        return self.formulas.turn(norm, rates), lr / norm, *balance
