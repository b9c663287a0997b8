"""``lightning-normreg inspect``: norms, and what the next step will do to them, without training."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rich.console import Console, RenderableType

from lightning_normreg._checkpoint import Checkpoint, read_checkpoint
from lightning_normreg._inspection import InspectedParameter, as_parameters, inspect_parameters, inspection_table
from lightning_normreg._invariance import load_verdict, save_verdict
from lightning_normreg._matching import match_parameters
from lightning_normreg._saved_optimizers import saved_groups
from lightning_normreg._watch import Verdict
from lightning_normreg.cli._errors import ArgumentRefused, refusals_of
from lightning_normreg.cli._examples import PROGRAM, epilog
from lightning_normreg.cli._namespace import DEFAULT
from lightning_normreg.cli._normreg_cli import parser_class

WIDTH = 160
"""Columns where the output is no terminal."""


@dataclass(frozen=True)
class Report:
    """What an inspection found.

    Attributes:
        rows: One for each parameter.
        notes: What is assumed, and what is left blank, in sentences.
        verdict: Which units are scale-invariant, empty where that is not known.
        title: Above the table.
        before: What people see above all that.
    """

    rows: Sequence[InspectedParameter]
    notes: Sequence[str]
    verdict: Verdict
    title: str
    before: Sequence[RenderableType] = field(default=())


def inspect(args: list[str]) -> None:
    """Show the norms and effective learning rates of a model or a checkpoint, without training.

    Args:
        args: A checkpoint, or arguments of ``fit``, or both.
    """
    words = ["--ckpt_path", *args] if args and not args[0].startswith("-") else list(args)
    if any(word.split("=")[0].split(".")[0] in ("--model", "--config", "-c") for word in words) and "--help" not in words:
        from lightning_normreg.cli._inspect_model import inspect_model

        inspect_model(words)
        return
    parser = _parser()
    options = parser.parse_args(words)
    if options.ckpt_path is None:
        parser.error("ckpt_path: nothing to inspect. Give a checkpoint, or a model by --model and --data or by --config.")
    try:
        report = inspect_checkpoint(options.ckpt_path, options.optimizer, options.invariance)
        show(report, options)
    except ArgumentRefused as error:
        parser.error(str(error))


def inspect_checkpoint(path: str, optimizer: str | None, invariance: str | None) -> Report:
    """What a file alone says.

    Raises:
        ArgumentRefused: Says the key, what is wrong with it, and what to do.
    """
    with refusals_of("ckpt_path"):
        checkpoint = read_checkpoint(path)
    with refusals_of("invariance"):
        verdict = checkpoint.verdict or {} if invariance is None else load_verdict(invariance)
    with refusals_of("optimizer"):
        groups, said = saved_groups(checkpoint.optimizers, [w for w in (optimizer or "").split(",") if w])
    owners, matched = match_parameters(groups, checkpoint.tensors, checkpoint.aliases)
    rows, blanks = inspect_parameters(as_parameters(checkpoint.tensors), owners, verdict)
    notes = [*_about_weights(checkpoint, verdict, given=invariance is not None), *said, *matched, *blanks]
    return Report(rows, notes, verdict, f"{path}: {checkpoint.about}")


def _about_weights(checkpoint: Checkpoint, verdict: Verdict, given: bool) -> list[str]:
    said = []
    if verdict:
        source = "the file that you gave" if given else "what a callback of the run has noted in the checkpoint"
        said.append(f"Which units are scale-invariant is from {source}.")
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


def add_output_arguments(parser: Any) -> None:
    """How the report is given, for both forms."""
    group = parser.add_argument_group("output", "A table, unless something else is said.")
    group.add_argument("--json", action="store_true", help="JSON with all digits; null is what is not known.")
    group.add_argument("--csv", action="store_true", help="CSV; what is said beside it goes to stderr.")
    group.add_argument(
        "--save",
        type=str | None,
        default=None,
        metavar="FILE",
        help="Write which units are scale-invariant; callbacks take the file as invariance=.",
    )
    group.add_argument(
        "--invariance", type=str | None, default=None, metavar="FILE", help="Such a file, in place of asking the model."
    )


def show(report: Report, options: Any) -> None:
    """Print a report, and save its verdict.

    Raises:
        ArgumentRefused: If there is no verdict to save, or it cannot be written.
    """
    if options.json and options.csv:
        raise ArgumentRefused("json", "it cannot be had together with --csv. Leave one out.")
    if options.save is not None:
        if not report.verdict:
            raise ArgumentRefused(
                "save", "which units are scale-invariant is not known. Name the model by --model and --data."
            )
        with refusals_of("save"):
            save_verdict(report.verdict, options.save)
    if options.json:
        print(json.dumps({"parameters": [_plain(row) for row in report.rows], "notes": list(report.notes)}, indent=1))
    elif options.csv:
        writer = csv.DictWriter(sys.stdout, [f.name for f in fields(InspectedParameter)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | {"shape": "x".join(map(str, row.shape))} for row in report.rows)
        sys.stderr.write("\n".join([*report.notes, ""]))
    else:
        plain = Console()
        console = plain if plain.is_terminal else Console(width=WIDTH)
        for part in (*report.before, inspection_table(report.rows, report.title), *report.notes):
            console.print(part, highlight=False, markup=False)


def _plain(row: InspectedParameter) -> dict[str, Any]:
    """For JSON, which has no infinite numbers."""
    values = asdict(row)
    wild = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return values | wild


def _parser() -> Any:
    parser = parser_class(DEFAULT)(
        prog=f"{PROGRAM} inspect",
        description="Norms and effective learning rates of a checkpoint, a model, or a model from a checkpoint.",
        epilog=epilog("inspect"),
    )
    alone = parser.add_argument_group("checkpoint", "No code in it is run, and no model is needed.")
    alone.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        metavar="FILE",
        help="The checkpoint, or a state dict by torch.save; also as the first word.",
    )
    alone.add_argument(
        "--optimizer",
        type=str | None,
        default=None,
        metavar="NAME",
        help="Class of its optimizer, such as AdamW or lion_pytorch.Lion, or several with commas between them. "
        "Without it only torch's own are recognized, by their settings.",
    )
    add_output_arguments(parser)
    model = parser.add_argument_group(
        "model", "All arguments of fit, to ask the model itself on its first batch. Nothing is trained or written."
    )
    for key, help_text in (("config", "YAML of fit."), ("model", "Class path."), ("data", "Class path.")):
        model.add_argument(f"--{key}", type=str | None, default=None, metavar=key.upper(), help=help_text)
    return parser
