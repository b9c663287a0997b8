"""What ``inspect`` has found, and the forms in which it is given."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import RenderableType

from lightning_normreg._reports import InspectedParameter, inspection_table
from lightning_normreg._symmetries import save_verdict
from lightning_normreg._weights import Verdict
from lightning_normreg.cli._console import console
from lightning_normreg.cli._errors import ArgumentRefused, refusals_of
from lightning_normreg.cli._parser import add_optional


@dataclass(frozen=True)
class Report:
    """What an inspection found."""

    rows: Sequence[InspectedParameter]
    notes: Sequence[str]  # what is assumed, and what is left blank, in sentences
    verdict: Verdict  # empty where nothing is known
    title: str  # above the table
    before: Sequence[RenderableType] = ()  # what people see above all that
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # further entries of each row for machines


def add_output_arguments(parser: Any) -> None:
    """How the report is given, for both forms."""
    group = parser.add_argument_group("output", "A table, unless something else is said.")
    group.add_argument("--json", action="store_true", help="JSON with all digits; null is what is not known.")
    group.add_argument("--csv", action="store_true", help="CSV; what is said beside it goes to stderr.")
    add_optional(
        group, "save", str, "FILE", "Write which units are scale-invariant; callbacks take the file as invariance=."
    )
    add_optional(group, "invariance", str, "FILE", "Such a file, in place of asking the model.")


def show(report: Report, options: Any) -> None:
    """Print a report, and save its verdict."""
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
        for part in (*report.before, inspection_table(report.rows, report.title), *report.notes):
            page.print(part, highlight=False, markup=False)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which has no infinite numbers: those are words."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
