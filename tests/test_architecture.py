"""The house stands: imports run downhill, the public surface is the list, files and functions stay small."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_normreg
from lightning_normreg import cli, demos, functional, steps

PACKAGE = Path(lightning_normreg.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    0: {"functional", "_metrics", "_compat"},
    1: {"_weights"},
    2: {"_optimizers", "_symmetries", "_plot"},
    3: {"_param_groups", "steps"},
    4: {"_reports"},
    5: {"callbacks"},
    6: {"demos"},
    7: {"cli"},
    8: {"__main__"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
WITH_LIGHTNING = {"callbacks", "demos", "cli"}
"""Rooms that may import it; `_compat` names it, and imports it when it is asked for."""

PUBLIC = {
    "CorrectedDecay",
    "DecayFreeLR",
    "DecayGroupsMixin",
    "EffectiveLRMonitor",
    "NormProjection",
    "NormRegCLI",
    "NormSummary",
    "ParameterRole",
    "Plan",
    "RotationControl",
    "ScaleInvariance",
    "WeightNormMonitor",
    "accept_rescaled",
    "decay_groups",
    "find_scale_invariance",
    "find_symmetries",
    "ReducedDecay",
    "Symmetries",
    "Symmetry",
    "reduce_decay",
    "functional",
    "load_verdict",
    "parameter_roles",
    "plan",
    "plot_curves",
    "register_update_rule",
    "rescale_",
    "save_verdict",
}
PUBLIC_FUNCTIONAL = {
    "rotation",
    "effective_lr",
    "equilibrium_half_life",
    "equilibrium_norm",
    "equilibrium_rotation",
    "gradient_alignment",
    "matched_lr",
    "predicted_norm",
    "predicted_rotation",
    "project_",
    "project_all_",
    "relative_update",
    "rotate_",
    "suggest_decay",
    "suggest_projection",
    "unit_norms",
    "weight_norm",
    "with_decay",
    "without_decay",
}
PUBLIC_DEMOS = {"DemoConvNet", "DemoTransformer", "DigitsDataModule", "TextDataModule"}
PUBLIC_STEPS = {
    "NormTracker",
    "Projector",
    "RotationTracker",
    "Rotator",
    "StepDispatcher",
    "StepSubscriber",
    "tags",
    "watch",
}


PUBLIC_CLI = {"NormRegCLI", "SchedulerChain", "SchedulerSequence", "main"}


def room_of(path: Path) -> str:
    """First part of a source file's place; "" for the package's own `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(tree: ast.AST) -> list[str]:
    """Modules that a file imports, those for types only included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "lightning_normreg":
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def wrong_imports(room: str, source: str) -> list[str]:
    """Imports that run uphill or sideways, pass by a private room's face, or bring Lightning to a lower floor."""
    wrong = []
    for module in imports(ast.parse(source)):
        first, *rest = module.split(".")
        if first in ("lightning", "pytorch_lightning") and room not in WITH_LIGHTNING:
            wrong.append(module)
        if first == "lightning_normreg" and rest and rest[0] != room:
            private = rest[0].startswith("_") and len(rest) > 1
            if FLOOR_OF[rest[0]] >= FLOOR_OF[room] or private:
                wrong.append(module)
    return wrong


def test_every_room_has_a_floor() -> None:
    """And at most six modules stand loose beside the rooms."""
    assert {room_of(path) for path in SOURCES} - {""} == FLOOR_OF.keys()
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("path", [p for p in SOURCES if room_of(p)], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downhill(path: Path) -> None:
    """No room knows one above or beside it, and only the top ones know Lightning."""
    if room_of(path) != "_compat":
        assert wrong_imports(room_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from lightning_normreg.callbacks import x",
        "from lightning_normreg._reports import x",
        "from lightning_normreg._param_groups import x",
        "from lightning_normreg._weights._roles import x",
        "import pytorch_lightning",
        "from lightning.pytorch import Callback",
    ],
)
def test_the_import_check_can_fail(line: str) -> None:
    """Uphill, sideways, past a face, and Lightning, each found in a file of ``steps``."""
    assert wrong_imports("steps", "from lightning_normreg import _metrics\n" + line) == [line.split()[1]]


def test_lower_floors_run_without_lightning() -> None:
    """They import, and the doctests of the two public ones pass, where Lightning is not installed."""
    lower = [f"lightning_normreg.{room}" for room, floor in FLOOR_OF.items() if floor < FLOOR_OF["callbacks"]]
    code = f"""
import sys
for name in ("lightning", "pytorch_lightning"):
    sys.modules[name] = None
import importlib
import pytest
for name in {lower!r}:
    importlib.import_module(name)
packages = ["lightning_normreg.functional", "lightning_normreg.steps"]
sys.exit(pytest.main(["-n0", "-q", "-p", "no:cacheprovider", "--pyargs", *packages]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize(
    "module, names",
    [
        (lightning_normreg, PUBLIC),
        (functional, PUBLIC_FUNCTIONAL),
        (demos, PUBLIC_DEMOS),
        (steps, PUBLIC_STEPS),
        (cli, PUBLIC_CLI),
    ],
)
def test_exported_names(module: object, names: set[str]) -> None:
    """What a module re-exports by `X as X`, and defines, is the documented surface, no more and no less."""
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    aliases = [a for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names]
    exported = {a.name for a in aliases if a.asname == a.name}
    exported |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    assert exported == names
    for name in names:
        assert inspect.getdoc(getattr(module, name))


def test_names_that_are_imported_late_are_listed() -> None:
    """For tab completion."""
    assert {*dir(lightning_normreg)} >= PUBLIC


def test_every_public_name_is_documented() -> None:
    """The pages of the documentation show each of them."""
    docs = Path(__file__).parent.parent / "docs"
    pages = "\n".join(page.read_text() for page in docs.rglob("*.md"))
    missing = [n for n in PUBLIC - {"functional"} if f"::: lightning_normreg.{n}\n" not in pages]
    missing += [n for n in PUBLIC_DEMOS if f"::: lightning_normreg.demos.{n}\n" not in pages]
    missing += [n for n in PUBLIC_CLI - {"NormRegCLI", "main"} if f"::: lightning_normreg.cli.{n}\n" not in pages]
    missing += [n for n in PUBLIC_STEPS if f"::: lightning_normreg.steps.{n}\n" not in pages]
    missing += [n for n in PUBLIC_FUNCTIONAL if f"- {n}\n" not in pages]
    assert missing == []


def test_files_and_functions_stay_small() -> None:
    """At most 300 lines a file and 45 lines a body, docstring not counted."""
    for path in SOURCES:
        source = path.read_text()
        assert len(source.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                assert lines <= 45, f"{path}: {node.name}"
