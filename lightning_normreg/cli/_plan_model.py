"""``plan`` with a model: built as ``fit`` would, asked on its first batch, its schedule followed, and stopped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import yaml
from torch.optim import Optimizer

from lightning_normreg import _reports
from lightning_normreg._compat import pl
from lightning_normreg._optimizers import UpdateRule, find_rule
from lightning_normreg._param_groups import DecayFreeLR
from lightning_normreg._reports import Plan
from lightning_normreg._symmetries import Symmetries, audit_decay
from lightning_normreg._weights import Verdict, listed, norms_of
from lightning_normreg.callbacks._corrected_decay import CorrectedDecay
from lightning_normreg.callbacks._holding import held_norms
from lightning_normreg.callbacks._norm_summary import summary_of
from lightning_normreg.callbacks._rotation_control import RotationControl
from lightning_normreg.callbacks._run import optimizers_of, run_of
from lightning_normreg.cli._errors import ArgumentRefused
from lightning_normreg.cli._inspect_model import Inspection, Look, inspect_model
from lightning_normreg.cli._parser import console
from lightning_normreg.cli._plan import Build, add_plan_arguments, show_plan
from lightning_normreg.steps._formulas import Rates

MOST = 1_000_000
"""Steps that a schedule is followed for at most."""


def plan_model(words: list[str]) -> None:
    inspect_model(words, _Planning)


class _LookAhead(Look):
    """For ``plan``: the whole run."""

    def look(self, trainer: pl.Trainer, verdict: Verdict, known: Symmetries | None) -> None:
        """Follow the schedule, which is used up by that: the run ends here."""
        why: list[str] = []
        if known is None and not all(v.is_invariant for v in verdict.values()):
            known, why = run_of(trainer).symmetries(trainer)
        steps = trainer.estimated_stepping_batches
        if not 0 < steps <= MOST:
            raise ArgumentRefused(
                "trainer.max_steps", f"how long the run is must be known, and {MOST:,} steps at most, got {steps}."
            )
        _, self._meaning = summary_of(trainer, verdict, known, why)
        watched = _reports.watch_all(run_of(trainer).named, verdict, known)
        norms = [*zip(watched, norms_of(watched), strict=True)]
        held = {name: radius for name, (_, radius) in held_norms(trainer).items()}
        optimizers = optimizers_of(trainer)
        rates, scheduled = followed(trainer, optimizers, int(steps))
        owners, refused = _reports.owners_of(watched, optimizers, rates)
        refused = _reports.refused_for_symmetry(watched) | refused | self._controlled(owners)
        refused |= {name: scheduled[id(group)] for name, (_, group, _) in owners.items() if id(group) in scheduled}

        self._optimizer = _written(optimizers[0])
        named = {p: name for name, p, _ in run_of(trainer).named}
        lrs: dict[str, float] = {}
        decayed: dict[str, float] = {}
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            lr = max(lr for lr, _ in rates[id(group)])
            lrs |= {named[p]: lr for p in group["params"] if p in named}
            decayed |= {named[p]: lr * group.get("weight_decay", 0.0) for p in group["params"] if p in named}
        self._why = why
        self._audited = None if known is None else partial(audit_decay, known, decayed, lrs)

        def build(of_decay: float, of_lr: float) -> Plan:
            changed = {
                name: (rule, group, [(lr * of_lr, decay * of_decay) for lr, decay in own])
                for name, (rule, group, own) in owners.items()
            }
            return _reports.plan_of(norms, changed, int(steps), refused=refused, held=held)

        self._build: Build = build
        self._decays = {
            name or str(number): (max(lr for lr, _ in own), own[0][1])
            for number, (name, own) in enumerate(_named_rates(optimizers, rates))
        }

    def _controlled(self, owners: Mapping[str, Any]) -> dict[str, str]:
        """What callbacks do that a plan does not know of."""
        others = [c for c in self.beside if isinstance(c, (CorrectedDecay, RotationControl))]
        why = "Its recipe has {}, which no plan knows of."
        return {name: why.format(type(others[0]).__name__) for name in owners} if others else {}

    def show(self, options: Any) -> None:
        """Print, draw and save it; or the recipe with as little decay as possible."""
        if options["as"] is None:
            show_plan(self._build, self._decays, [" ".join(self._meaning)], options)
            return
        if self._audited is None:
            raise ArgumentRefused("symmetries", f"they could not be found. {' '.join(self._why)}")
        audit = self._audited()
        for part in audit.sentences:
            console().print(part, highlight=False, markup=False)
        print(yaml.safe_dump(self._gains(audit.left), sort_keys=False), end="")

    def _gains(self, left: Mapping[str, float]) -> dict[str, Any]:
        """For ``fit --config``."""
        odd = [name for name, decay in left.items() if decay < 0 or "[" in name or name.startswith("1 + ")]
        if odd:
            raise ArgumentRefused(
                "as",
                f"what is left is no decay that groups of parameters can have: of {listed(odd, 3)}, which would grow, "
                "or are parts of tensors. Decay the same tensors more evenly, such as biases beside their weights.",
            )
        return {"optimizer": self._optimizer, "decay": {"overrides": {**left}}}


class _Planning(Inspection):
    """To be mixed into a :class:`NormRegCLI`."""

    command = "plan"
    kept = ("max_epochs", "max_steps")
    add_output = staticmethod(add_plan_arguments)
    look = _LookAhead


def _written(optimizer: Optimizer) -> dict[str, Any]:
    """As ``fit`` takes it, without decay."""
    kept = {key: value for key, value in optimizer.defaults.items() if key in ("lr", "betas", "momentum", "eps")}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
    return {
        "class_path": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "init_args": plain | {"weight_decay": 0.0},
    }


def followed(
    trainer: pl.Trainer, optimizers: Sequence[Optimizer], steps: int
) -> tuple[dict[int, list[Rates]], dict[int, str]]:
    """Learning rate and decay of each step by the ``id`` of a group, and of which the momentum is scheduled too.

    The schedulers are stepped as Lightning does.
    """
    accumulated = trainer.accumulate_grad_batches
    batches = trainer.num_training_batches
    per_epoch = math.ceil(batches / accumulated) if math.isfinite(batches) else steps
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, DecayFreeLR) or config.reduce_on_plateau:
            name = type(config.scheduler).__name__
            what = "follows a metric" if config.reduce_on_plateau else "stands for decay, which a plan shows by itself"
            raise ArgumentRefused("lr_scheduler", f"{name} {what}. Plan the recipe without it.")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rules = {id(group): find_rule(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups}
    momenta = {id(group): [group.get(key) for key in ("momentum", "betas")] for group in groups}
    rates: dict[int, list[Rates]] = {id(group): [] for group in groups}
    scheduled: dict[int, str] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # no optimizer steps here
        for step in range(1, steps + 1):
            for group in groups:
                rule = rules[id(group)]
                lr = rule.lr(group) if isinstance(rule, UpdateRule) else group["lr"]
                rates[id(group)].append((float(lr), float(group.get("weight_decay", 0.0))))
                if momenta[id(group)] != [group.get(key) for key in ("momentum", "betas")]:
                    scheduled[id(group)] = "Its momentum is scheduled, and the formulas take it to be constant."
            within = (step - 1) % per_epoch + 1
            for config in trainer.lr_scheduler_configs:
                number = min(within * accumulated, batches) if config.interval == "step" else -(-step // per_epoch)
                if (config.interval == "step" or within == per_epoch) and number % config.frequency == 0:
                    config.scheduler.step()  # type: ignore[call-arg]  # none of a plateau, whose step takes a metric
    return rates, scheduled


def _named_rates(optimizers: Sequence[Optimizer], rates: Mapping[int, list[Rates]]) -> list[tuple[str, list[Rates]]]:
    several = sum(len(optimizer.param_groups) for optimizer in optimizers) > 1
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [
        (str(group.get("name", number)) if several else "", rates[id(group)]) for number, group in enumerate(groups)
    ]
