"""``lightning-normreg plan``: what a recipe will do to norms and rotations, before the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table

from lightning_normreg import _reports
from lightning_normreg._reports import Plan
from lightning_normreg._symmetries import Symmetries, load_verdict
from lightning_normreg._weights import norms_of
from lightning_normreg.cli._convert import convert
from lightning_normreg.cli._errors import ArgumentRefused, refusals_of
from lightning_normreg.cli._parser import add_optional, console, parser_of
from lightning_normreg.cli._plot import SUFFIXES
from lightning_normreg.cli._recipe import Form
from lightning_normreg.cli._recipe_arguments import add_recipe_arguments, given_recipe

Build = Callable[[float, float], Plan]
"""The plan where all decays, and all learning rates, are multiplied by a factor."""
_GOALS = ("timescale", "rotation")


def plan(args: list[str]) -> None:
    """Predict norms and rotations of a run; or rewrite its recipe, by ``--as``."""
    words = ["--ckpt_path", *args] if args and not args[0].startswith("-") else list(args)
    keys = {word.split("=")[0].split(".")[0] for word in words}
    if "--as" in keys and "gains" not in words and "--as=gains" not in words:
        convert(words)
    elif keys & {"--model", "--config", "-c"} and not keys & {"-h", "--help"}:
        from lightning_normreg.cli._plan_model import plan_model  # noqa: PLC0415, which imports Lightning

        plan_model(words)
    else:
        _plan_checkpoint(words)


def _plan_checkpoint(words: list[str]) -> None:
    """Norms of a checkpoint, and a recipe."""
    parser = parser_of(
        "plan", "Norms and rotations of a run, predicted before it starts; or its recipe in another form."
    )
    start = parser.add_argument_group(
        "start",
        "A model, by all arguments of fit (--config, --model, --data, ...); or norms of a checkpoint, with a recipe.",
    )
    add_optional(start, "ckpt_path", str, "FILE", "The checkpoint; also as the first word.")
    add_recipe_arguments(parser)
    add_plan_arguments(parser)
    model = parser.add_argument_group("model", "All arguments of fit. It is asked on its first batch, and not trained.")
    for key, help_text in (("config", "YAML of fit."), ("model", "Class path."), ("data", "Class path.")):
        add_optional(model, key, str, key.upper(), help_text)
    options = parser.parse_args(words)
    try:
        if options["as"] is not None:
            raise ArgumentRefused(
                "as", "gains are found by asking the model. Give it by --model and --data or --config."
            )
        if options.ckpt_path is None:
            raise ArgumentRefused("ckpt_path", "nothing to plan. Give a checkpoint, or a model by --model or --config.")
        build, decays = _of_checkpoint(options)
        show_plan(build, decays, [], options)
    except ArgumentRefused as error:
        parser.error(str(error))


def _of_checkpoint(options: Any) -> tuple[Build, dict[str, tuple[float, float]]]:
    with refusals_of("ckpt_path"):
        checkpoint = _reports.read_checkpoint(options.ckpt_path)
    with refusals_of("invariance"):
        verdict = checkpoint.verdict or {} if options.invariance is None else load_verdict(options.invariance)
    with refusals_of("symmetries"):
        known = checkpoint.symmetries if options.symmetries is None else Symmetries.load(options.symmetries)
    if not verdict:
        raise ArgumentRefused(
            "invariance", "which weights are scale-invariant is not in the checkpoint. Give a file of inspect --save."
        )
    recipe = given_recipe(options)
    if not isinstance(recipe.lr, list):
        raise ArgumentRefused("steps", "how long the run is must be known. Give their number.")
    named = _reports.as_parameters(checkpoint.tensors)
    with refusals_of("symmetries"):
        watched = _reports.watch_all(named, verdict, known)
    norms = [*zip(watched, norms_of(watched), strict=True)]
    rates = recipe.rates()
    settings = {"optimizer": recipe.optimizer, "lr": 1.0, "weight_decay": recipe.weight_decay, **recipe.settings}

    def build(of_decay: float, of_lr: float) -> Plan:
        with refusals_of("optimizer"):
            return _reports.plan_norms(
                norms, settings | {"weight_decay": recipe.weight_decay * of_decay}, [rate * of_lr for rate in rates]
            )

    return build, {"": (max(rates), recipe.weight_decay)}


def add_plan_arguments(parser: Any) -> None:
    """What is asked of a plan, and how it is given, for both forms."""
    group = parser.add_argument_group("plan")
    goal = (
        "Find decay and learning rate for timescale=0.2, 1/Σ(lr·decay) as a share of the run, or for rotation=0.003, "
    )
    add_optional(group, "for", str, "GOAL", f"{goal}the median over steps and weights.")
    as_help = "The recipe in another form: gains, with as little decay as possible, placed on gains where it can be; "
    forms = ", ".join(get_args(Form))
    add_optional(group, "as", Literal["gains"], "FORM", f"{as_help}{forms}, see plan --as projection --help.")
    add_optional(group, "save", str, "FILE", "JSON, for EffectiveLRMonitor(plan=...) and plot --plan.")
    add_optional(group, "output", str, "FILE", f"A picture: {', '.join(SUFFIXES)}.")
    group.add_argument("--json", action="store_true", help="JSON with all digits; null is what is not known.")
    add_optional(group, "invariance", str, "FILE", "Which units are scale-invariant, by inspect --save.")
    add_optional(group, "symmetries", str, "FILE", "A file of Symmetries.save, for sets of tensors.")


def show_plan(build: Build, decays: dict[str, tuple[float, float]], notes: Sequence[str], options: Any) -> None:
    """Print, draw and save what is asked for; ``decays`` has learning rate and decay of each group."""
    goal = None if options["for"] is None else _goal(options["for"])
    found = build(1.0, 1.0)
    said = list(notes)
    if goal is not None:
        said += _found(goal, build, found, decays)
    with refusals_of("save"):
        if options.save is not None:
            found.save(options.save)
    with refusals_of("output"):
        if options.output is not None:
            _draw(found, options.output)
    if options.json:
        print(json.dumps(found.to_dict() | {"notes": [*found.sentences(), *said]}, allow_nan=False))
        return
    page = console()
    for part in (*([plan_table(found)] if found.units else []), *found.sentences(), *said):
        page.print(part, highlight=False, markup=False)


def _goal(text: str) -> tuple[str, float]:
    key, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if key not in _GOALS or not value > 0:
        raise ArgumentRefused("for", f"it must be timescale=NUMBER or rotation=NUMBER, positive, got {text!r}.")
    return key, value


def _found(goal: tuple[str, float], build: Build, plan: Plan, decays: dict[str, tuple[float, float]]) -> list[str]:
    """The decay, and the learning rate, that give what is asked for."""
    said = []
    ways: tuple[tuple[str, str, Callable[[float], Plan]], ...] = (
        ("weight_decay", "lr", lambda x: build(x, 1.0)),
        ("lr", "weight_decay", lambda x: build(1.0, x)),
    )
    for place, (key, same, way) in enumerate(ways):
        try:
            factor = _reports.factor_for(goal, way, plan)
        except ValueError as error:
            said.append(f"No {key} gives {goal[0]} {goal[1]:g}: {error}")
            continue
        new = {group: f"{pair[1 - place] * factor:.4g}" for group, pair in decays.items() if pair[1 - place]}
        words = ", ".join(f"{value} for {group}" for group, value in new.items())
        words = words if len(set(new.values())) > 1 else next(iter(new.values()))
        said.append(f"For {goal[0]} {goal[1]:g} at the same {same}: {key} {words}.")
    return said


def _draw(plan: Plan, path: str) -> None:
    from lightning_normreg._plot import plot_curves  # noqa: PLC0415, matplotlib need not be there

    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"it must end in {', '.join(SUFFIXES)}, got {path!r}.")
    if not plan.units:
        raise ValueError("there is nothing to draw, as nothing can be planned.")
    plot_curves(plan.to_frame(), title="plan").savefig(path)


def plan_table(plan: Plan) -> Table:
    """Start, end and peak of each unit."""
    table = Table(title=f"Plan of {plan.steps:,} steps".replace(",", " "), caption=_CAPTION)
    for name in (
        "unit",
        "norm: start",
        "end",
        "n*",
        "rotation: peak",
        "end",
        "θ*",
        "lr/n: end",
        "relaxed",
        "timescale",
    ):
        table.add_column(name, justify="left" if name == "unit" else "right", overflow="fold")
    for name, unit in plan.units.items():
        known = [place for place, rotation in enumerate(unit.rotation) if rotation > 0]  # a schedule may end at 0
        last = known[-1] if known else 0
        peak = max(unit.rotation[: last + 1])
        numbers = (
            unit.norm[0], unit.norm[last], unit.equilibrium_norm[last], peak, unit.rotation[last],
            unit.equilibrium_rotation[last], unit.effective_lr[last], unit.relaxed[-1], unit.timescale,
        )  # fmt: skip
        table.add_row(name, *(f"{value:.3g}" if math.isfinite(value) else "" for value in numbers))
    return table


_CAPTION = (
    "Root mean squares over units, rotations in radians per step. n*, θ*: where learning rate and decay of the last "
    "step would settle. relaxed: relaxation times gone through, of 3 that it takes. timescale: 1/Σ(lr·decay), as a "
    "share of the run."
)
