"""The house stands: imports run downhill, the public surface is the list, files and functions stay small."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_normreg
from lightning_normreg import demos, functional, steps

PACKAGE = Path(lightning_normreg.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Floor of each top-level module; a module may import from its own floor and from those below.
FLOORS = {
    "functional": 0,
    "_metrics": 0,
    "_history": 0,
    "_optimizers": 1,
    "_rescale": 1,
    "_run_logs": 1,
    "_schedules": 1,
    "_selection": 2,
    "_roles": 2,
    "_plot": 2,
    "_invariance": 2,
    "_flat_shards": 1,
    "_sharding": 1,
    "_watched": 3,
    "_sharded": 3,
    "_watch": 3,
    "_targets": 3,
    "_summary": 3,
    "_statistics": 3,
    "_step_hooks": 3,
    "_observer": 3,
    "_health": 3,
    "_tracker": 3,
    "_rotation_tracker": 3,
    "_equilibrium": 3,
    "_checkpoint": 3,
    "_saved_optimizers": 3,
    "_matching": 3,
    "_inspection": 3,
    "_projector": 3,
    "_angles": 3,
    "_rotator": 3,
    "_regroup": 3,
    "_decay_groups": 3,
    "_corrected_decay": 3,
    "steps": 3,
    "_compat": 4,
    "callbacks": 4,
    "demos": 5,
    "cli": 5,
    "__main__": 5,
}

PUBLIC = {
    "CorrectedDecay",
    "DecayFreeLR",
    "DecayGroupsMixin",
    "EffectiveLRMonitor",
    "NormProjection",
    "NormRegCLI",
    "NormSummary",
    "ParameterRole",
    "RotationControl",
    "ScaleInvariance",
    "SchedulerChain",
    "SchedulerSequence",
    "WeightNormMonitor",
    "accept_rescaled",
    "decay_groups",
    "find_scale_invariance",
    "functional",
    "load_verdict",
    "parameter_roles",
    "plot_curves",
    "register_update_rule",
    "rescale_",
    "save_verdict",
}
PUBLIC_FUNCTIONAL = {
    "angular_update",
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
PUBLIC_DEMOS = {"DemoConvNet", "DigitsDataModule"}
PUBLIC_STEPS = {"NormTracker", "Projector", "RotationTracker", "Rotator", "StepDispatcher", "tags", "watch"}


def top(path: Path) -> str:
    """Top-level module of a source file; "" for the package's own `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(tree: ast.AST) -> list[str]:
    """Modules that a file imports, those for types only included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def uphill(path: Path, source: str) -> list[str]:
    """Imports of a file that run uphill, or bring Lightning below floor 4."""
    floor = FLOORS[top(path)]
    wrong = []
    for module in imports(ast.parse(source)):
        first, _, rest = module.partition(".")
        if first == "lightning_normreg" and FLOORS.get(rest.split(".")[0], 0) > floor:
            wrong.append(module)
        if first in ("lightning", "pytorch_lightning") and floor < 4:
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("path", [p for p in SOURCES if top(p)], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downhill(path: Path) -> None:
    """No floor knows one above it, and only floors 4 and 5 know Lightning."""
    assert uphill(path, path.read_text()) == []


def test_the_import_check_can_fail() -> None:
    """An import of a callback, and one of Lightning, are found on floor 3."""
    source = (
        "from lightning_normreg.callbacks import x\nfrom lightning_normreg import _metrics\nimport pytorch_lightning"
    )
    assert uphill(PACKAGE / "_tracker.py", source) == [
        "lightning_normreg.callbacks",
        "lightning_normreg.callbacks.x",
        "pytorch_lightning",
    ]


def test_lower_floors_run_without_lightning() -> None:
    """Floors 0 to 3 import where Lightning cannot be imported at all."""
    lower = [f"lightning_normreg.{name}" for name, floor in FLOORS.items() if floor < 4]
    code = f"""
import sys, types
for name in ("lightning", "pytorch_lightning"):
    sys.modules[name] = None
package = types.ModuleType("lightning_normreg")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["lightning_normreg"] = package
import importlib
for name in {lower!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module, names",
    [(lightning_normreg, PUBLIC), (functional, PUBLIC_FUNCTIONAL), (demos, PUBLIC_DEMOS), (steps, PUBLIC_STEPS)],
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


def test_every_public_name_is_documented() -> None:
    """The pages of the documentation show each of them."""
    docs = Path(__file__).parent.parent / "docs"
    pages = "\n".join(page.read_text() for page in docs.rglob("*.md"))
    missing = [n for n in PUBLIC - {"functional"} if f"::: lightning_normreg.{n}\n" not in pages]
    missing += [n for n in PUBLIC_DEMOS if f"::: lightning_normreg.demos.{n}\n" not in pages]
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
