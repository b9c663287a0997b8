"""What is imported: no subcommand waits for a library that it does not use; short names of classes are known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}
HEAVY = LIGHTNING | {"torch", "numpy", "pandas", "matplotlib", "jsonargparse"}

SUBCOMMANDS = """
import sys
from lightning_normreg import cli

for words in {commands!r}:
    try:
        cli.main(words)
    except SystemExit as end:
        assert end.code == 0, words
    imported = {{name.partition(".")[0] for name in sys.modules}}
    print("imported", *imported)
"""
USERS_SCRIPT = """
from {namespace}.cli import LightningCLI
from {namespace}.demos.boring_classes import BoringModel
import lightning_normreg

words = ["--trainer.callbacks=EffectiveLRMonitor", "--trainer.callbacks.every_n_steps=5"]
words += ["--trainer.callbacks+=NormSummary", "--trainer.callbacks+=NormProjection", "--trainer.callbacks.radius=2.0"]
words += ["--trainer.callbacks+=RotationControl", "--trainer.callbacks+=CorrectedDecay"]
words += ["--trainer.callbacks+=WeightNormMonitor", "--trainer.logger=false", "--trainer.accelerator=cpu"]
trainer = LightningCLI(BoringModel, run=False, args=words).trainer
print("callbacks", *(type(callback).__name__ for callback in trainer.callbacks))
"""
MONITORS = ["EffectiveLRMonitor", "WeightNormMonitor"]
CALLBACKS = ["NormSummary", "NormProjection", "RotationControl", "CorrectedDecay"]


def run(*program: str, folder: Path) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-W", "ignore", *program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(commands: list[list[str]], folder: Path) -> list[set[str]]:
    """Packages that are there after each of the commands, run one after the other in one process."""
    out = run("-c", SUBCOMMANDS.format(commands=commands), folder=folder)
    return [set(line.split()[1:]) for line in out.splitlines() if line.startswith("imported ")]


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """The overview, the versions, and the help of what only draws."""
    for packages in imported([["--help"], ["--version"], ["plot", "--help"]], tmp_path):
        assert packages & HEAVY == set()


def test_what_needs_no_model_needs_no_lightning(tmp_path: Path) -> None:
    """``plan --as``, ``inspect`` of a checkpoint, and their helps."""
    net = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    content = {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    torch.save(content, tmp_path / "saved.ckpt")
    recipe = "--as projection --optimizer AdamW --lr 1e-3 --weight_decay 0.1 --entries 576"
    commands = [["plan", "--help"], ["plan", *recipe.split()], ["inspect", "--help"], ["inspect", "saved.ckpt"]]
    found = imported(commands, tmp_path)
    assert len(found) == len(commands)
    for command, packages in zip(commands, found, strict=True):
        assert packages & LIGHTNING == set(), command
        assert {"torch", "jsonargparse"} <= packages


@pytest.mark.slow
def test_the_check_can_fail(tmp_path: Path) -> None:
    """The help of ``fit`` lists the arguments of Lightning's Trainer."""
    (packages,) = imported([["fit", "--help"]], tmp_path)
    assert packages & LIGHTNING


@pytest.mark.slow
@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_short_names_in_a_script_of_the_users(namespace: str, tmp_path: Path) -> None:
    """With Lightning's own command line, importing the package is enough."""
    out = run("-c", USERS_SCRIPT.format(namespace=namespace), folder=tmp_path)
    (line,) = (line for line in out.splitlines() if line.startswith("callbacks "))
    assert {*MONITORS, *CALLBACKS} <= set(line.split())


@pytest.mark.slow
def test_short_names_in_fit(tmp_path: Path) -> None:
    """Classes of the package, without a class path."""
    names = ["DemoConvNet", "DigitsDataModule", "SchedulerSequence", "DecayFreeLR", "NormSummary", "CorrectedDecay"]
    (tmp_path / "config.yaml").write_text(
        """
        model: DemoConvNet
        data: DigitsDataModule
        optimizer: {class_path: SGD, init_args: {lr: 0.1}}
        lr_scheduler:
            class_path: SchedulerSequence
            init_args: {schedulers: [{class_path: ConstantLR}, {class_path: DecayFreeLR}], milestones: [2]}
        trainer: {callbacks: [{class_path: NormSummary}, {class_path: CorrectedDecay}]}
        """
    )
    out = run("-m", "lightning_normreg", "fit", "--config=config.yaml", "--print_config", folder=tmp_path)
    assert [name for name in names if f".{name}\n" not in out] == []
