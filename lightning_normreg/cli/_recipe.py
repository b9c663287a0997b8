"""A recipe of learning rate, decay and projection, and its conversions, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from lightning_normreg._optimizers import UpdateRule, named_rules
from lightning_normreg.functional import suggest_decay, suggest_projection, with_decay, without_decay
from lightning_normreg.functional._families import FAMILIES
from lightning_normreg.functional._recipes import EXPONENTS

Form = Literal["decay", "projection", "schedule"]
OF_THE_UNIT = ("entries", "gradient_norm", "shape")
_COMMON = ("lr", "weight_decay")


@dataclass(frozen=True)
class Recipe:
    """How scale-invariant weights are trained: with decay, projected, or by a learning rate for each step."""

    form: Form
    optimizer: str  # class, or family of functional.equilibrium_norm
    lr: float | list[float]  # one for all steps, or one for each
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
        known = {rule.family for rule in rules if isinstance(rule, UpdateRule)}
        if len(known) != 1 or len(rules) != sum(isinstance(rule, UpdateRule) for rule in rules) or known == {""}:
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
        lr = recipe.rate()
        found = suggest_projection(
            recipe.family, radius=radius, lr=lr, weight_decay=recipe.weight_decay, **recipe.arguments()
        )
        undo = {"weight_decay": recipe.weight_decay, "lr": lr}
        return replace(recipe, form=to, lr=found.lr, weight_decay=0.0, radius=found.radius, undo=undo)
    if to == "schedule":
        plain = without_decay(recipe.family, recipe.rates(), recipe.weight_decay, **_momentum(recipe))
        settings = recipe.settings | ({"momentum": plain.momenta} if recipe.family == "sgd_decoupled" else {})
        undo = {"weight_decay": recipe.weight_decay}
        if len(set(recipe.rates())) == 1:
            undo["lr"] = recipe.rates()[0]
        return replace(
            recipe, form=to, lr=plain.lrs, weight_decay=0.0, settings=settings, scales=plain.scales, undo=undo
        )
    if recipe.form == "projection":
        if recipe.radius is None:
            raise ValueError("a projection has a radius. Give it by --radius.")
        lr, decayed = recipe.rate(), recipe.undo.get("lr", recipe.rate())
        decay = suggest_decay(recipe.family, radius=recipe.radius, lr=lr, decayed_lr=decayed, **recipe.arguments())
        return replace(recipe, form=to, lr=decayed, weight_decay=decay, radius=None, undo={})
    decay = recipe.undo.get("weight_decay", 0.0)
    back = with_decay(recipe.family, recipe.rates(), decay, **_momentum(recipe))
    momenta = {"momentum": back.momenta[0]} if recipe.family == "sgd_decoupled" and back.momenta else {}
    settings = recipe.settings | momenta
    return replace(recipe, form=to, lr=back.lrs, weight_decay=decay, settings=settings, scales=back.scales, undo={})


_OTHERS = {"decay": "projection or a schedule", "projection": "decay", "schedule": "decay"}


def _momentum(recipe: Recipe) -> dict[str, Any]:
    """Settings that count where momentum sums up; that of the others is an average, and stays as it is."""
    if recipe.optimizer.endswith("RAdam"):
        raise ValueError("RAdam's first steps scale otherwise, so no schedule makes the same ones. Use AdamW.")
    keys = ("momentum", "dampening") if recipe.family in ("sgd", "sgd_decoupled") else ()
    return {key: recipe.settings[key] for key in keys if recipe.settings.get(key)}


def to_plain(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe).items() if value not in (None, {})}


def from_plain(content: Mapping[str, Any]) -> Recipe:
    """The reverse; an error if it is no recipe."""
    known = {f.name for f in fields(Recipe)}
    wrong = sorted(set(content) - known) or sorted({"form", "optimizer", "lr"} - set(content))
    if wrong or content["form"] not in _OTHERS:
        raise ValueError(f"it is no recipe by convert --json: look at {', '.join(wrong) or 'form'}.")
    return Recipe(**content)
