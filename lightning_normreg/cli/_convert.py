"""``lightning-normreg plan --as``: a recipe with decay as one without, and back."""

from __future__ import annotations

import json
from typing import Any

import yaml
from rich.table import Table

from lightning_normreg.cli._errors import ArgumentRefused, refusals_of
from lightning_normreg.cli._parser import Parser, add_optional, console, parser_of
from lightning_normreg.cli._recipe import Form, Recipe, converted, to_plain
from lightning_normreg.cli._recipe_arguments import add_recipe_arguments, given_recipe
from lightning_normreg.functional import equilibrium_half_life, equilibrium_rotation, matched_lr
from lightning_normreg.functional._families import FAMILIES
from lightning_normreg.functional._recipes import EXPONENTS


def convert(args: list[str]) -> None:
    """Rewrite a recipe with weight decay in another form, or back."""
    parser = _parser()
    options = parser.parse_args(args)
    try:
        to = options["as"]
        recipe = given_recipe(options, to)
        with refusals_of("as"):
            found = converted(recipe, to, options.radius)
        matched = _matched(recipe, found, options.norm)
    except ArgumentRefused as error:
        parser.error(str(error))
    if options.json:
        more = {} if matched is None else {"matched_lr": matched}
        print(json.dumps(to_plain(found) | more, indent=1, allow_nan=False))
        return
    page = console()
    page.print(_table(recipe, found))
    for said in _words(recipe, found, matched):
        page.print(said, highlight=False, markup=False)
    if (config := _config(found)) is not None:
        page.print("\nFor fit --config:", highlight=False)
        print(yaml.safe_dump(config, sort_keys=False), end="")


def _matched(recipe: Recipe, found: Recipe, norm: float | None) -> float | None:
    """Learning rate under projection that makes the very next step of decay, from a norm that has not settled."""
    if norm is None:
        return None
    with refusals_of("norm"):
        sums = recipe.settings.get("momentum") if recipe.family == "sgd" else None
        if found.form != "projection" or found.radius is None or recipe.family not in EXPONENTS or sums:
            raise ValueError(
                "it goes with --as projection, for SGD without momentum, AdamW, NAdam with decoupled decay, Lion and "
                "Muon: for others there is no exact conversion."
            )
        exponent = EXPONENTS[recipe.family]
        return matched_lr(recipe.rate(), recipe.weight_decay, norm=found.radius, decayed_norm=norm, exponent=exponent)


def _table(before: Recipe, after: Recipe) -> Table:
    table = Table(title=f"{before.optimizer}: {before.form} → {after.form}")
    for name in ("setting", before.form, after.form):
        table.add_column(name, justify="left" if name == "setting" else "right", overflow="fold")
    rows = len(before.rates())
    for step in dict.fromkeys([0, rows // 4, rows // 2, 3 * rows // 4, rows - 1]):
        label = f"lr, step {step}" if rows > 1 else "lr"
        table.add_row(label, _digits(before.rates()[step]), _digits(after.rates()[step]))
    table.add_row("weight_decay", _digits(before.weight_decay), _digits(after.weight_decay))
    if before.radius or after.radius:
        table.add_row("radius", _digits(before.radius), _digits(after.radius))
    if after.scales or before.scales:
        ends = ["1", _digits(1 / (after.scales or before.scales or [])[-1])]
        table.add_row("norm after the last step, relative", *(ends if before.form == "decay" else reversed(ends)))
    return table


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _words(before: Recipe, after: Recipe, matched: float | None) -> list[str]:
    """Why the two are one recipe, and where that ends."""
    said = ["Holds for scale-invariant weights alone: to others decay and norm mean something else."]
    decay = before if before.form == "decay" else after
    if "schedule" in (before.form, after.form):
        reason = "The direction of each weight is the same at every step: decay shrinks the weight, and a smaller "
        reason += "weight turns further, which the learning rate can do instead."
        return [reason, *said, *_of_schedule(decay)]
    settings = decay.arguments() | {"lr": decay.rate(), "weight_decay": decay.weight_decay}
    rotation = equilibrium_rotation(decay.family, **settings)
    noise = f"{100 * FAMILIES[decay.family].tolerance:.0f} %"
    does = "A projection to this radius turns it as far, from the first step on."
    if "angle" in (before.form, after.form):
        does = "RotationControl turns it by this angle from the first step on, whatever its norm."
    reason = f"Decay lets a unit settle where it turns by {rotation:.4g} rad per step, and holds it there. {does}"
    said = [reason, *said]
    try:
        half = equilibrium_half_life(decay.family, **settings)
        said.append(f"Valid at the equilibrium, which decay comes half-way to in {half:.4g} steps.")
    except ValueError as error:
        said.append(f"Not valid here: {error}")
    said.append(
        f"To first order in lr·weight_decay = {decay.rate() * decay.weight_decay:.3g}, and within about {noise} where "
        "gradients have a signal."
    )
    if "entries" in decay.unit:
        said.append(f"The radius is that of units of {decay.unit['entries']:g} entries: others settle elsewhere.")
    said.append(
        "Under a schedule the rotation is proportional to lr under projection and where lr is the angle, and to its "
        "square root under slow decay: take the root of the schedule's factors."
    )
    if matched is not None:
        said.append(
            f"From the norm that it has now, the next step of decay is that of projection at lr {matched:.17g}, if the "
            "optimizer's state follows the ratio of the norms, as DecayFreeLR lets it."
        )
    return said


def _of_schedule(decay: Recipe) -> list[str]:
    said = ["Exact for any schedule, as long as every weight gets a gradient in every step."]
    if decay.family == "sgd":
        said.append("It takes a momentum that starts from zero, as at the start of a run.")
    elif decay.family == "sgd_decoupled":
        said.append("The momentum of each step changes too: --json has it.")
    else:
        said.append(
            "Learning rates alone leave an error: before each step first moments are proportional to s, second moments "
            "to its square, and eps is s times as large (--json has s as scales). DecayFreeLR does all of it while "
            "training."
        )
    return said


def _config(found: Recipe) -> dict[str, Any] | None:
    """What to write in the YAML of ``fit``, where one can."""
    if found.optimizer in EXPONENTS or found.optimizer.islower():
        return None
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in found.settings.items() if v is not None}
    lr, weight_decay = found.lr, found.weight_decay
    if found.form == "schedule":
        lr, weight_decay = found.undo.get("lr", []), found.undo["weight_decay"]
    if isinstance(lr, list):
        return None
    made = {"lr": lr, "weight_decay": weight_decay, **settings}
    config: dict[str, Any] = {"optimizer": {"class_path": found.optimizer, "init_args": made}}
    if found.form == "schedule":
        config["lr_scheduler"] = {"class_path": "DecayFreeLR"}
    elif found.form == "angle":
        config["rotation"] = {"angle": "lr"}
    elif found.radius is not None:
        config["projection"] = {"radius": found.radius}
    return config


def _parser() -> Parser:
    parser = parser_of("plan", "A recipe with weight decay in another form, or back.")
    parser.add_argument(
        "--as",
        type=Form,
        required=True,
        help="What to make: projection to a radius, a learning rate for each step, an angle per step for "
        "RotationControl, or decay again.",
    )
    add_recipe_arguments(parser)
    other = parser.add_argument_group("the other recipe")
    add_optional(other, "radius", float, "X", "Of the projection.")
    norm_help = "That a unit has now: gives the rate at which projection makes the next step exactly."
    add_optional(other, "norm", float, "X", norm_help)
    add_optional(other, "decayed_lr", float, "X", "lr to have with decay again.")
    parser.add_argument_group("output").add_argument("--json", action="store_true", help="JSON with all digits.")
    return parser
