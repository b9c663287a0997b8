"""``lightning-normreg inspect``: norms, and what the next step will do to them, without training."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import RenderableType

from lightning_normreg import _reports
from lightning_normreg._symmetries import Symmetries, load_verdict, save_verdict
from lightning_normreg._weights import Verdict, listed
from lightning_normreg.cli._errors import ArgumentRefused, blamed_on, refusals_of
from lightning_normreg.cli._parser import Parser, add_optional, console, parser_of


@dataclass(frozen=True)
class Report:
    rows: Sequence[_reports.InspectedParameter]
    notes: Sequence[str]  # what is assumed, and what is left blank, in sentences
    verdict: Verdict  # empty where nothing is known
    title: str  # above the table
    before: Sequence[RenderableType] = ()  # what people see above all that
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # further entries of each row for machines


def inspect(args: list[str]) -> None:
    """Show the norms and effective learning rates of a model or a checkpoint, without training."""
    words = ["--ckpt_path", *args] if args and not args[0].startswith("-") else list(args)
    keys = {word.split("=")[0].split(".")[0] for word in words}
    if keys & {"--model", "--config", "-c"} and not keys & {"-h", "--help"}:
        from lightning_normreg.cli._inspect_model import inspect_model  # noqa: PLC0415, which imports Lightning

        inspect_model(words)
        return
    parser = _parser()
    options = parser.parse_args(words)
    if options.ckpt_path is None:
        parser.error(
            "ckpt_path: nothing to inspect. Give a checkpoint, or a model by --model and --data or by --config."
        )
    try:
        report = inspect_checkpoint(options.ckpt_path, options.optimizer, options.invariance, options.symmetries)
        show(report, options)
    except ArgumentRefused as error:
        parser.error(str(error))


def inspect_checkpoint(path: str, optimizer: str | None, invariance: str | None, symmetries: str | None) -> Report:
    """What a file alone says."""
    if path.endswith((".yaml", ".yml")):
        raise ArgumentRefused("ckpt_path", f"{path!r} is a configuration, no checkpoint. Give it by --config.")
    with refusals_of("ckpt_path"):
        checkpoint = _reports.read_checkpoint(path)
    with refusals_of("invariance"):
        verdict = checkpoint.verdict or {} if invariance is None else load_verdict(invariance)
    with refusals_of("symmetries"):
        known = checkpoint.symmetries if symmetries is None else Symmetries.load(symmetries)
    with blamed_on("ckpt_path"):  # what is in the file need make no sense
        with refusals_of("optimizer"):
            groups, said = _reports.saved_groups(checkpoint.optimizers, [w for w in (optimizer or "").split(",") if w])
        owners, matched = _reports.match_parameters(groups, checkpoint.tensors, checkpoint.aliases)
        rows, blanks = _reports.inspect_parameters(_reports.as_parameters(checkpoint.tensors), owners, verdict)
    if known is not None and (checkpoint.optimizers or symmetries is not None):
        rows, meaning = _what_decay_does(rows, owners, known, given=symmetries is not None)
        said = [*said, *meaning]
    notes = [*_about_weights(checkpoint, verdict, given=invariance is not None), *said, *matched, *blanks]
    return Report(rows, notes, verdict, f"{path}: {checkpoint.about}")


def _what_decay_does(
    rows: list[_reports.InspectedParameter], owners: Mapping[str, _reports.SavedGroup], known: Symmetries, given: bool
) -> tuple[list[_reports.InspectedParameter], list[str]]:
    """The rows with it, and sentences. A checkpoint need not hold all weights that its run has asked."""
    try:
        known.check_names(row.parameter for row in rows)
    except ValueError as error:
        if given:
            raise ArgumentRefused("symmetries", error) from error
        return rows, ["What decay does is not said: symmetries noted in the checkpoint are of weights not in it."]
    return _reports.with_what_decay_does(rows, owners, known)


def _about_weights(checkpoint: _reports.Checkpoint, verdict: Verdict, given: bool) -> list[str]:
    said = []
    if verdict:
        source = "the file that you gave" if given else "what a callback of the run has noted in the checkpoint"
        said.append(f"Which units are scale-invariant is from {source}.")
        unknown = [name for name in checkpoint.tensors if name not in verdict]
        if unknown:
            said.append(f"It says nothing of {listed(unknown)}, whose rows are taken for units.")
    else:
        said.append(
            "Which weights are scale-invariant is not known, so rows are taken for units (for a transposed convolution "
            "they are none), and lr/n^p, n* and θ* mean something only where they are. Name the model by --model and "
            "--data, or give a verdict by --invariance."
        )
    if not checkpoint.optimizers:
        said.append("There is no optimizer in it, so norms are all there is.")
    others = [name for name in checkpoint.left_out if not name.endswith(("running_mean", "running_var", "tracked"))]
    if others:
        said.append(f"Not read, because they are no plain tensors of real or complex numbers: {', '.join(others[:5])}.")
    if checkpoint.aliases:
        tied = ", ".join(f"{name} = {' = '.join(also)}" for name, also in checkpoint.aliases.items())
        said.append(f"Tied, and shown once: {tied}.")
    return said


def _parser() -> Parser:
    parser = parser_of(
        "inspect", "Norms and effective learning rates of a checkpoint, a model, or a model from a checkpoint."
    )
    alone = parser.add_argument_group("checkpoint", "No code in it is run, and no model is needed.")
    checkpoint_help = "The checkpoint, or a state dict by torch.save; also as the first word."
    add_optional(alone, "ckpt_path", str, "FILE", checkpoint_help)
    optimizer_help = "Class of its optimizer, such as AdamW or lion_pytorch.Lion, or several with commas between them. "
    optimizer_help += "Without it only torch's own are recognized, by their settings."
    add_optional(alone, "optimizer", str, "NAME", optimizer_help)
    add_output_arguments(parser)
    model = parser.add_argument_group(
        "model", "All arguments of fit, to ask the model itself on its first batch. Nothing is trained or written."
    )
    for key, help_text in (("config", "YAML of fit."), ("model", "Class path."), ("data", "Class path.")):
        add_optional(model, key, str, key.upper(), help_text)
    return parser


def add_output_arguments(parser: Any) -> None:
    """How the report is given, for both forms."""
    group = parser.add_argument_group("output", "A table, unless something else is said.")
    group.add_argument("--json", action="store_true", help="JSON with all digits; null is what is not known.")
    group.add_argument("--csv", action="store_true", help="CSV; what is said beside it goes to stderr.")
    add_optional(
        group, "save", str, "FILE", "Write which units are scale-invariant; callbacks take the file as invariance=."
    )
    add_optional(group, "invariance", str, "FILE", "Such a file, in place of asking the model.")
    symmetries_help = "A file of Symmetries.save, to say what weight decay does to the function."
    add_optional(group, "symmetries", str, "FILE", symmetries_help)


def show(report: Report, options: Any) -> None:
    if options.json and options.csv:
        raise ArgumentRefused("json", "it cannot be had together with --csv. Leave one out.")
    if options.save is not None:
        if not report.verdict:
            raise ArgumentRefused(
                "save", "which units are scale-invariant is not known. Name the model by --model and --data."
            )
        with refusals_of("save"):
            save_verdict(report.verdict, options.save)
    rows = [asdict(row) | dict(report.more.get(row.parameter, {})) for row in report.rows]
    if options.json:
        print(json.dumps({"parameters": [*map(_finite, rows)], "notes": list(report.notes)}, indent=1, allow_nan=False))
    elif options.csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else ["parameter"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"shape": "x".join(map(str, row["shape"]))} for row in rows)
        sys.stderr.write("\n".join([*report.notes, ""]))
    else:
        page = console()
        for part in (*report.before, _reports.inspection_table(report.rows, report.title), *report.notes):
            page.print(part, highlight=False, markup=False)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which has no infinite numbers: those are words."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
