"""A recipe of learning rate, decay and projection, and its conversions, as plain data.

It is read from a YAML of ``fit``, or from what ``plan --as ... --json`` has written.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_normreg._optimizers import UpdateRule, named_rules
from lightning_normreg.cli._schedulers import MakeScheduler, natural_interval
from lightning_normreg.functional import (
    equilibrium_rotation,
    suggest_decay,
    suggest_projection,
    with_decay,
    without_decay,
)
from lightning_normreg.functional._families import FAMILIES
from lightning_normreg.functional._recipes import EXPONENTS

Form = Literal["projection", "schedule", "angle", "decay"]
OF_THE_UNIT = ("entries", "gradient_norm", "shape")
_COMMON = ("lr", "weight_decay")
_LEFT_OUT = ("params", *_COMMON, "foreach", "fused", "capturable", "differentiable", "maximize")


@dataclass(frozen=True)
class Recipe:
    """How scale-invariant weights are trained: with decay, projected, by a rate for each step, or by an angle."""

    form: Form
    optimizer: str  # class, or family of functional.equilibrium_norm
    lr: float | list[float]  # one for all steps, or one for each; of an angle, radians
    weight_decay: float = 0.0
    radius: float | None = None  # of the projection
    settings: dict[str, Any] = field(default_factory=dict)  # others of the optimizer; a momentum per step if it varies
    unit: dict[str, Any] = field(default_factory=dict)  # of OF_THE_UNIT what the family asks for
    scales: list[float] | None = None  # weight under decay over weight without, before each step and after the last
    undo: dict[str, float] = field(default_factory=dict)  # decay and learning rate of the recipe that this is made from

    @property
    def family(self) -> Any:
        """Family of formulas that the optimizer is computed by; an error if nobody knows one."""
        if self.optimizer in FAMILIES or self.optimizer in EXPONENTS:
            return self.optimizer
        rules = named_rules(self.optimizer, self.settings | {"weight_decay": self.weight_decay or 1.0})
        known = {rule.family if isinstance(rule, UpdateRule) else "" for rule in rules}
        if len(known) != 1 or known == {""}:
            families = ", ".join(dict.fromkeys([*FAMILIES, *EXPONENTS]))
            raise ValueError(
                f"the equilibrium of {self.optimizer!r} with these settings is not known. Use a class of torch.optim, "
                f"one of another package as package.Class, or a family: {families}."
            )
        return known.pop()

    def arguments(self) -> dict[str, Any]:
        """What the formulas of the family take, besides learning rate and decay."""
        known = FAMILIES[self.family].settings if self.family in FAMILIES else ()
        return {k: v for k, v in (self.settings | self.unit).items() if k in known and k not in _COMMON}

    def rate(self) -> float:
        """The learning rate; an error if there is one for each step."""
        if isinstance(self.lr, list):
            raise ValueError(
                "a schedule has no projection at one learning rate. Convert its largest rate by --lr, and take the "
                "square root of the schedule's factors; or train with DecayFreeLR(project=True), which is exact."
            )
        return self.lr

    def rates(self) -> list[float]:
        return self.lr if isinstance(self.lr, list) else [self.lr]


def converted(recipe: Recipe, to: Form, radius: float | None = None) -> Recipe:
    """Another recipe that turns scale-invariant weights the same way; the radius is by default where decay settles."""
    if recipe.form == to or "decay" not in (recipe.form, to):
        raise ValueError(f"a recipe with {recipe.form} is converted to {_OTHERS[recipe.form]}, got {to!r}.")
    if to == "projection":
        lr, decay = recipe.rate(), recipe.weight_decay
        found = suggest_projection(recipe.family, radius=radius, lr=lr, weight_decay=decay, **recipe.arguments())
        undo = {"weight_decay": decay, "lr": lr}
        return replace(recipe, form=to, lr=found.lr, weight_decay=0.0, radius=found.radius, undo=undo)
    if to == "angle":
        if isinstance(recipe.lr, list):
            raise ValueError(
                "a schedule has an angle for each step. Keep the recipe as it is, and train with "
                "--rotation.angle equilibrium, which follows it."
            )
        lr, decay = recipe.lr, recipe.weight_decay
        angle = equilibrium_rotation(recipe.family, lr=lr, weight_decay=decay, **recipe.arguments())
        return replace(recipe, form=to, lr=angle, weight_decay=0.0, undo={"weight_decay": decay, "lr": lr})
    if to == "schedule":
        plain = without_decay(recipe.family, recipe.rates(), recipe.weight_decay, **_momentum(recipe))
        settings = recipe.settings | ({"momentum": plain.momenta} if recipe.family == "sgd_decoupled" else {})
        undo = {"weight_decay": recipe.weight_decay}
        if len(set(recipe.rates())) == 1:
            undo["lr"] = recipe.rates()[0]
        return replace(
            recipe, form=to, lr=plain.lrs, weight_decay=0.0, settings=settings, scales=plain.scales, undo=undo
        )
    if recipe.form != "schedule":
        return _with_decay(recipe)
    decay = recipe.undo.get("weight_decay", 0.0)
    back = with_decay(recipe.family, recipe.rates(), decay, **_momentum(recipe))
    momenta = {"momentum": back.momenta[0]} if recipe.family == "sgd_decoupled" and back.momenta else {}
    settings = recipe.settings | momenta
    return replace(recipe, form=to, lr=back.lrs, weight_decay=decay, settings=settings, scales=back.scales, undo={})


def _with_decay(recipe: Recipe) -> Recipe:
    """Decay that settles at the radius of a projection, or turns by the angle."""
    if recipe.form == "projection" and recipe.radius is None:
        raise ValueError("a projection has a radius. Give it by --radius.")
    if recipe.form == "angle" and "lr" not in recipe.undo:
        raise ValueError("an angle is made decay at some learning rate. Give it by --decayed_lr.")
    lr, decayed = recipe.rate(), recipe.undo.get("lr", recipe.rate())
    goal: dict[str, Any] = {"radius": recipe.radius, "lr": lr, "decayed_lr": decayed}
    if recipe.form == "angle":
        goal = {"rotation": lr, "lr": decayed}
    decay = suggest_decay(recipe.family, **goal, **recipe.arguments())
    return replace(recipe, form="decay", lr=decayed, weight_decay=decay, radius=None, undo={})


_OTHERS = {"decay": "projection, a schedule or an angle", "projection": "decay", "schedule": "decay", "angle": "decay"}


def _momentum(recipe: Recipe) -> dict[str, Any]:
    """Settings that count where momentum sums up; that of the others is an average, and stays as it is."""
    if recipe.optimizer.endswith("RAdam"):
        raise ValueError("RAdam's first steps scale otherwise, so no schedule makes the same ones. Use AdamW.")
    keys = ("momentum", "dampening") if recipe.family in ("sgd", "sgd_decoupled") else ()
    return {key: recipe.settings[key] for key in keys if recipe.settings.get(key)}


def to_plain(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe).items() if value not in (None, {})}


def read_recipe(path: str, steps: int | None, steps_per_epoch: int | None) -> Recipe:
    """What a YAML of ``fit``, whose schedule is followed for so many steps, or a JSON of ``plan --as`` says."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path!r} must hold a mapping, got {type(content).__name__}.")
    if "form" not in content:
        return _of_config(content.get("fit") or content, steps, steps_per_epoch)
    known = {f.name for f in fields(Recipe)}
    wrong = sorted(set(content) - known) or sorted({"form", "optimizer", "lr"} - set(content))
    if wrong or content["form"] not in _OTHERS:
        raise ValueError(f"it is no recipe by plan --as ... --json: look at {', '.join(wrong) or 'form'}.")
    return Recipe(**content)


def _of_config(config: Mapping[str, Any], steps: int | None, steps_per_epoch: int | None) -> Recipe:
    name, given = _class_and_arguments(config.get("optimizer"))
    module, _, short = name.rpartition(".")
    try:
        optimizer_class = getattr(import_module(module or "torch.optim"), short)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"optimizer: {error}. Name a class of torch.optim, or another as package.Class.") from error
    defaults = inspect.signature(optimizer_class).parameters
    settings = {k: p.default for k, p in defaults.items() if p.default is not p.empty} | given
    lr, decay = float(settings["lr"]), float(settings.get("weight_decay", 0.0))
    rates: float | list[float] = lr
    if config.get("lr_scheduler"):
        if steps is None:
            raise ValueError(
                "it has an lr_scheduler. Say by --steps how many steps of it to convert to a schedule; for a "
                "projection give its largest rate by --lr, without the file."
            )
        rates = _followed(config, optimizer_class, settings, steps, steps_per_epoch)
    elif steps is not None:
        rates = [lr] * steps
    own = {key: value for key, value in settings.items() if key not in _LEFT_OUT}
    projection = config.get("projection")
    radius = projection.get("radius", "auto") if isinstance(projection, Mapping) else None
    if isinstance(projection, Mapping) or projection is True:
        if not isinstance(radius, int | float):
            raise ValueError(f"projection.radius: a number is needed, got {radius!r}.")
        return Recipe("projection", name, rates, 0.0, float(radius), own)
    rotation = config.get("rotation")
    if isinstance(rotation, Mapping) or rotation is True:
        angle = rotation.get("angle", "lr") if isinstance(rotation, Mapping) else "lr"
        if angle == "equilibrium":
            return Recipe("decay", name, rates, decay, None, own)
        return Recipe("angle", name, rates if angle == "lr" else float(angle), 0.0, None, own)
    return Recipe("decay", name, rates, decay, None, own)


def _class_and_arguments(entry: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and isinstance(entry.get("class_path"), str):
        return entry["class_path"], {**(entry.get("init_args") or {}), **(entry.get("dict_kwargs") or {})}
    raise ValueError("optimizer: there is none, or without class_path. Give the recipe by --optimizer, --lr and so on.")


def _followed(
    config: Mapping[str, Any], optimizer_class: Any, settings: dict[str, Any], steps: int, steps_per_epoch: int | None
) -> list[float]:
    """Learning rate of each step, by running the schedule on a parameter that nothing moves."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--lr_scheduler", type=MakeScheduler)
    try:
        make = parser.instantiate_classes(parser.parse_object({"lr_scheduler": config["lr_scheduler"]})).lr_scheduler
    except Exception as error:
        raise ValueError(f"lr_scheduler: {' '.join(str(error).split())[:300]}") from error
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    arguments = {k: v for k, v in settings.items() if k in inspect.signature(optimizer_class).parameters}
    optimizer = optimizer_class([parameter], **arguments)
    scheduler = make(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("lr_scheduler: ReduceLROnPlateau follows a metric, so its rates are not known beforehand.")
    by_step = (config.get("lr_interval") or natural_interval(scheduler)) == "step"
    if not by_step and steps_per_epoch is None:
        raise ValueError("lr_scheduler: it goes by epochs. Say by --steps_per_epoch how many steps one has.")
    (group,) = optimizer.param_groups
    momentum = [group.get(key) for key in ("momentum", "betas")]
    rates = []
    for step in range(1, steps + 1):
        rates.append(float(group["lr"]))
        if momentum != [group.get(key) for key in ("momentum", "betas")]:
            raise ValueError(
                "lr_scheduler: it changes the momentum too, for which there is no conversion. Set cycle_momentum: "
                "false."
            )
        optimizer.step()
        if by_step or step % (steps_per_epoch or 1) == 0:
            scheduler.step()
    return rates
