"""What is said of optimizers: in warnings, and on the page of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg._optimizers import NoRule, UpdateRule
from lightning_normreg._optimizers._packages import RULES
from lightning_normreg._weights._roles import named_roles
from lightning_normreg._weights._selection import watch
from lightning_normreg.steps._rotation_tracker import RotationTracker


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("LBFGS", {}, "LBFGS: it takes steps of the size that its closure and its past steps suggest"),
        ("SparseAdam", {}, "SparseAdam: it moves only the entries that have a gradient"),
        ("Rprop", {}, "Rprop: it uses its learning rate only to start the sizes of its steps"),
        (
            "Adafactor",
            {},
            r"Adafactor: its step grows with the weight \(p = 0\).* It is proportional to lr/‖w‖ where .* eps\.",
        ),
    ],
)
def test_why_a_curve_is_missing(name: str, options: dict[str, Any], said: str) -> None:
    """The reason is that of the optimizer."""
    net = nn.Linear(2, 2)
    tracker = RotationTracker(watch(named_roles(net), ["weight"], (), "neuron"))
    optimizer = getattr(torch.optim, name)(net.parameters(), **options)
    with pytest.warns(UserWarning, match=f"`effective_lr` is left out for the weights of {said}") as caught:
        tracker.explain_rules([optimizer])
    assert len(caught) == 1


def test_nothing_is_said_of_a_curve_that_is_there() -> None:
    """Nor of an optimizer whose weights are not watched."""
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    tracker = RotationTracker(watch(named_roles(net), ["weight"], (), "neuron"))
    tracker.explain_rules([torch.optim.RAdam(net.parameters()), torch.optim.LBFGS(other.parameters())])


def exponents(rule: UpdateRule | NoRule) -> set[int]:
    """Exponents under all settings."""
    if isinstance(rule, NoRule):
        return set()
    return {rule.exponent}.union(*(exponents(variant) for _, variant in rule.variants))


def rows() -> list[str]:
    """The tables of the page, from the rules."""
    lines = []
    for name, rule in RULES["torch"].items():
        p, note = ("–", rule.why) if isinstance(rule, NoRule) else (str(rule.exponent), rule.note)
        lines.append(f"| `{name}` | {p} | {note} |")
    for package, rules in RULES.items():
        cells: dict[Any, list[str]] = {2: [], 1: [], 0: [], "several": []}
        for name, rule in rules.items():
            found = exponents(rule)
            cells[found.pop() if len(found) == 1 else "several"].append(f"`{name}`")
        if package != "torch":
            lines.append(f"| {package} | " + " | ".join(", ".join(names) for names in cells.values()) + " |")
    return lines


def test_the_page_lists_every_rule() -> None:
    """The tables in the documentation are those of the rules."""
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text().splitlines()
    tables = [line for line in page if line.startswith("| ") and "---" not in line and " p |" not in line]
    tables = [line for line in tables if not line.startswith(("| | |", "| **"))]  # the card
    assert [line for line in tables if not line.startswith("| package")] == rows()
