"""``lightning-normreg convert``: a recipe with decay as one without, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import yaml
from rich.table import Table

from lightning_normreg.cli._errors import ArgumentRefused, refusals_of
from lightning_normreg.cli._parser import Parser, add_optional, console, parser_of
from lightning_normreg.cli._recipe import OF_THE_UNIT, Recipe, converted, read_recipe, to_plain
from lightning_normreg.functional import equilibrium_half_life, equilibrium_rotation, matched_lr
from lightning_normreg.functional._families import FAMILIES
from lightning_normreg.functional._recipes import EXPONENTS

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


def convert(args: list[str]) -> None:
    """Rewrite a recipe with weight decay as one with projection or a schedule, or back."""
    parser = _parser()
    options = parser.parse_args(args)
    try:
        recipe = _given(options)
        with refusals_of("to"):
            found = converted(recipe, options.to, options.radius)
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


# Arguments that would be left unused.
_UNUSED = {"projection": ("decayed_lr",), "schedule": ("decayed_lr", "radius"), "decay": ()}


def _given(options: Any) -> Recipe:
    """The recipe of a file, or that of the arguments."""
    for key in _UNUSED[options.to]:
        if options[key] is not None:
            raise ArgumentRefused(key, f"it means nothing with --to {options.to}. Leave it out.")
    for key in ("steps", "steps_per_epoch"):
        if options[key] is not None and options[key] < 1:
            raise ArgumentRefused(key, f"it must be positive, got {options[key]}.")
    settings = {key: options[key] for key in _SETTINGS if options[key] is not None}
    unit = {key: options[key] for key in OF_THE_UNIT if options[key] is not None}
    wanted = {"lr": options.decayed_lr, "weight_decay": options.weight_decay} if options.to == "decay" else {}
    undo = {key: value for key, value in wanted.items() if value is not None}
    recipe = _from_arguments(options) if options.recipe is None else _from_file(options)
    if recipe.form == "projection" and options.to == "decay" and options.weight_decay is not None:
        raise ArgumentRefused("weight_decay", "that is what is looked for. Leave it out, or give --decayed_lr.")
    return replace(recipe, settings=recipe.settings | settings, unit=recipe.unit | unit, undo=recipe.undo | undo)


def _from_file(options: Any) -> Recipe:
    with refusals_of("recipe"):
        for key in ("optimizer", "lr", "radius" if options.to == "decay" else "weight_decay"):
            if options[key] is not None:
                raise ValueError(f"it says {key} itself. Leave --{key} out, or the file.")
        read = read_recipe(options.recipe, options.steps, options.steps_per_epoch)
        if read.form == "decay" and options.to == "schedule" and not isinstance(read.lr, list):
            raise ValueError("a schedule has a rate for each step. Say by --steps how many.")
    return read


def _from_arguments(options: Any) -> Recipe:
    needed = {"projection": ["weight_decay"], "schedule": ["weight_decay", "steps"], "decay": []}[options.to]
    for key in ("optimizer", "lr", *needed):
        if options[key] is None:
            raise ArgumentRefused(key, "it is needed, or a file by --recipe.")
    lr: float | list[float] = options.lr if options.steps is None else [options.lr] * options.steps
    if options.to != "decay":
        return Recipe("decay", options.optimizer, lr, options.weight_decay)
    if options.radius is not None:
        return Recipe("projection", options.optimizer, lr, radius=options.radius)
    if options.steps is None or options.weight_decay is None:
        raise ArgumentRefused(
            "to", "decay is made of a projection, with --radius, or of a schedule, with --steps and --weight_decay."
        )
    return Recipe("schedule", options.optimizer, lr)


def _matched(recipe: Recipe, found: Recipe, norm: float | None) -> float | None:
    """Learning rate under projection that makes the very next step of decay, from a norm that has not settled."""
    if norm is None:
        return None
    with refusals_of("norm"):
        sums = recipe.settings.get("momentum") if recipe.family == "sgd" else None
        if found.form != "projection" or found.radius is None or recipe.family not in EXPONENTS or sums:
            raise ValueError(
                "it goes with --to projection, for SGD without momentum, AdamW, NAdam with decoupled decay, Lion and "
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
    reason = (
        f"Decay lets a unit settle where it turns by {rotation:.4g} rad per step, and holds it there. A projection to "
        "this radius turns it as far, from the first step on."
    )
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
        "Under a schedule the rotation is proportional to lr under projection, and to its square root under slow "
        "decay: take the root of the schedule's factors."
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
    elif found.radius is not None:
        config["projection"] = {"radius": found.radius}
    return config


def _parser() -> Parser:
    parser = parser_of("convert", "A recipe with weight decay as one with projection or a schedule, or back.")
    parser.add_argument(
        "--to",
        type=Literal["projection", "schedule", "decay"],
        required=True,
        help="What to make: projection to a radius, a learning rate for each step, or decay again.",
    )
    recipe = parser.add_argument_group("recipe", "That of the optimizer, as its class calls it.")
    add_optional(recipe, "recipe", str, "FILE", "YAML of fit, or JSON by convert --json.")
    add_optional(recipe, "optimizer", str, "NAME", "Class, such as AdamW, or family.")
    for key in ("lr", "weight_decay"):
        add_optional(recipe, key, float, "X", f"Its {key}.")
    for key in _SETTINGS:
        add_optional(recipe, key, _TYPES.get(key, float), "X", _HELP[key])
    units = parser.add_argument_group("unit", "For projection: what the equilibrium of this optimizer depends on.")
    for key in OF_THE_UNIT:
        add_optional(units, key, _TYPES.get(key, float), "X", _HELP[key])
    other = parser.add_argument_group("the other recipe")
    add_optional(other, "radius", float, "X", "Of the projection.")
    norm_help = "That a unit has now: gives the rate at which projection makes the next step exactly."
    add_optional(other, "norm", float, "X", norm_help)
    add_optional(other, "decayed_lr", float, "X", "lr to have with decay again.")
    add_optional(other, "steps", int, "N", "Of the schedule.")
    add_optional(other, "steps_per_epoch", int, "N", "For one by epochs.")
    parser.add_argument_group("output").add_argument("--json", action="store_true", help="JSON with all digits.")
    return parser
