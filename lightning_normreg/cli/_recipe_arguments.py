"""Arguments that say a recipe, and what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_normreg.cli._errors import ArgumentRefused, refusals_of
from lightning_normreg.cli._parser import add_optional
from lightning_normreg.cli._recipe import OF_THE_UNIT, Form, Recipe, read_recipe

_SETTINGS = ("momentum", "dampening", "nesterov", "betas")
_HELP = {
    "momentum": "β of SGD and Muon.",
    "dampening": "τ of SGD.",
    "nesterov": "Whether SGD's momentum is Nesterov's.",
    "betas": "β₁ and β₂ of Adam, Lion and their kin.",
    "entries": "Entries of a unit: of one neuron under BatchNorm, of the whole weight under LayerNorm.",
    "gradient_norm": "Norm of a unit's gradient times its own norm, for SGD and for decay that goes into the gradient.",
    "shape": "Of the matrix, for Muon.",
}
_TYPES: dict[str, type] = {"nesterov": bool, "betas": list[float], "shape": list[int]}


def add_recipe_arguments(parser: Any) -> None:
    """A recipe, by a file or by its settings."""
    recipe = parser.add_argument_group("recipe", "That of the optimizer, as its class calls it.")
    add_optional(recipe, "recipe", str, "FILE", "YAML of fit, or JSON by plan --as ... --json.")
    add_optional(recipe, "optimizer", str, "NAME", "Class, such as AdamW, or family.")
    for key in ("lr", "weight_decay"):
        add_optional(recipe, key, float, "X", f"Its {key}.")
    for key in _SETTINGS:
        add_optional(recipe, key, _TYPES.get(key, float), "X", _HELP[key])
    add_optional(recipe, "steps", int, "N", "Of the run.")
    add_optional(recipe, "steps_per_epoch", int, "N", "For a schedule by epochs.")
    units = parser.add_argument_group("unit", "For projection: what the equilibrium of this optimizer depends on.")
    for key in OF_THE_UNIT:
        add_optional(units, key, _TYPES.get(key, float), "X", _HELP[key])


_UNUSED = {
    "projection": ("decayed_lr",), "schedule": ("decayed_lr", "radius"), "angle": ("decayed_lr", "radius"), "decay": ()
}  # fmt: skip
"""By form arguments that would be left unused."""


def given_recipe(options: Any, to: Form = "schedule") -> Recipe:
    """The recipe of a file, or that of the arguments, to be rewritten."""
    for key in _UNUSED[to]:
        if options.get(key) is not None:
            raise ArgumentRefused(key, f"it means nothing with --as {to}. Leave it out.")
    for key in ("steps", "steps_per_epoch"):
        if options[key] is not None and options[key] < 1:
            raise ArgumentRefused(key, f"it must be positive, got {options[key]}.")
    settings = {key: options[key] for key in _SETTINGS if options[key] is not None}
    unit = {key: options[key] for key in OF_THE_UNIT if options[key] is not None}
    wanted = {"lr": options.get("decayed_lr"), "weight_decay": options.weight_decay} if to == "decay" else {}
    undo = {key: value for key, value in wanted.items() if value is not None}
    recipe = _from_arguments(options, to) if options.recipe is None else _from_file(options, to)
    if recipe.form == "projection" and to == "decay" and options.weight_decay is not None:
        raise ArgumentRefused("weight_decay", "that is what is looked for. Leave it out, or give --decayed_lr.")
    return replace(recipe, settings=recipe.settings | settings, unit=recipe.unit | unit, undo=recipe.undo | undo)


def _from_file(options: Any, to: Form) -> Recipe:
    with refusals_of("recipe"):
        for key in ("optimizer", "lr", "radius" if to == "decay" else "weight_decay"):
            if options[key] is not None:
                raise ValueError(f"it says {key} itself. Leave --{key} out, or the file.")
        read = read_recipe(options.recipe, options.steps, options.steps_per_epoch)
        if read.form == "decay" and to == "schedule" and not isinstance(read.lr, list):
            raise ValueError("a schedule has a rate for each step. Say by --steps how many.")
    return read


def _from_arguments(options: Any, to: Form) -> Recipe:
    needed = {"schedule": ["weight_decay", "steps"], "decay": []}.get(to, ["weight_decay"])
    for key in ("optimizer", "lr", *needed):
        if options[key] is None:
            raise ArgumentRefused(key, "it is needed, or a file by --recipe.")
    lr: float | list[float] = options.lr if options.steps is None else [options.lr] * options.steps
    if to != "decay":
        return Recipe("decay", options.optimizer, lr, options.weight_decay)
    if options.radius is not None:
        return Recipe("projection", options.optimizer, lr, radius=options.radius)
    if options.steps is None or options.weight_decay is None:
        raise ArgumentRefused(
            "as", "decay is made of a projection, with --radius, of a schedule, with --steps and --weight_decay, or of "
            "an angle, with a --recipe that has one."
        )  # fmt: skip
    return Recipe("schedule", options.optimizer, lr)
