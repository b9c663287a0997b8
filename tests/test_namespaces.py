"""`pytorch_lightning` and `lightning.pytorch`: one package for both, and for machines that have only one of them."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lightning_normreg import EffectiveLRMonitor
from tests.test_architecture import PUBLIC

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPET = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "trainer.fit" in block)
NAMESPACES = {"pytorch_lightning": "lightning", "lightning.pytorch": "pytorch_lightning"}
"""The two names, each with the package of the other."""

CHECK = """
import sys
tags = set(trainer.callback_metrics)
assert "weights/effective_lr/net.0.weight" in tags, tags
assert "weights/weight_norm/net.3.weight" in tags, tags
print("loaded", *sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None}))
"""


def run(code: str, folder: Path) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.pitfall(22)
@pytest.mark.parametrize("blocked", [False, True], ids=["both", "the-other-blocked"])
@pytest.mark.parametrize("namespace", list(NAMESPACES))
def test_the_snippet_of_the_readme(namespace: str, blocked: bool, tmp_path: Path) -> None:
    """As it stands, and with the other name in the import; also where the other package cannot be imported at all."""
    assert "from pytorch_lightning import" in SNIPPET
    code = SNIPPET.replace("from pytorch_lightning import", f"from {namespace} import")
    block = f"import sys\nsys.modules[{NAMESPACES[namespace]!r}] = None\n" if blocked else ""
    loaded = run(block + code + CHECK, tmp_path).rpartition("loaded ")[2].split()
    assert (NAMESPACES[namespace] in loaded) is not blocked


@pytest.mark.pitfall(22)
@pytest.mark.parametrize("namespace", list(NAMESPACES))
def test_callbacks_are_of_both(namespace: str) -> None:
    """A Trainer knows a single one by its class."""
    callback = EffectiveLRMonitor()
    run = import_module(namespace).Trainer(accelerator="cpu", logger=False, callbacks=callback)
    assert callback in run.callbacks


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["pytorch_lightning", "lightning"])
def test_everything_imports_without_the_other(missing: str, tmp_path: Path) -> None:
    """Every module of the package."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
import pkgutil, importlib, lightning_normreg
for module in pkgutil.walk_packages(lightning_normreg.__path__, "lightning_normreg."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    assert "lightning_normreg.cli" in run(code, tmp_path).split()


def test_a_star_import_brings_the_documented_names() -> None:
    """Although each is looked up when it is first used."""
    names: dict[str, object] = {}
    exec("from lightning_normreg import *", names)
    assert names.keys() | {"steps"} >= PUBLIC


def test_a_plain_loop_may_warn_where_lightning_is_not_installed(tmp_path: Path) -> None:
    """A unit without a direction is reported, and decay groups say what they are."""
    code = """
import sys, warnings
sys.modules["pytorch_lightning"] = sys.modules["lightning"] = None
import torch
from lightning_normreg import decay_groups
from lightning_normreg.steps import Projector, watch
net = torch.nn.Linear(3, 2, bias=False)
torch.nn.init.zeros_(net.weight[0])
decay_groups(net, 0.1)
projector = Projector(watch(net), 1.0)
projector.project(projector.targets)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    projector.report()
print(caught[0].message)
"""
    assert "has 1 zero unit of 2: it has no direction" in run(code, tmp_path)
