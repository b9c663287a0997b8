"""Help for people: a screen for each group, and examples that run as written."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning
import torch

import lightning_normreg
from lightning_normreg import cli

LINES, COLUMNS = 40, 100
SUBCOMMANDS = ["fit", "validate", "test", "predict", *cli.COMMANDS]


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What ``--help`` prints."""
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(words)
    return capsys.readouterr().out


def examples(text: str) -> list[list[str]]:
    """The commands at the end of a help, as a shell reads them."""
    commands = text.partition("\nexamples:\n")[2].replace("\\\n", " ").strip().splitlines()
    words = [shlex.split(command) for command in commands]
    assert all(first == "lightning-normreg" for first, *_ in words)
    return [rest for _, *rest in words]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """Of each subcommand, from a process in which nobody has defined further modules that a help would list."""
    code = f"""
import contextlib, io, json
from lightning_normreg import cli
helps = {{}}
for subcommand in {SUBCOMMANDS!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main([subcommand, "--help"])
    helps[subcommand] = out.getvalue()
print(json.dumps(helps))
"""
    environment = os.environ | {"COLUMNS": str(COLUMNS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_each_group_fits_a_screen(subcommand: str, helps: dict[str, str]) -> None:
    """At a width of 100 columns, none is longer than 40 lines, and none is named after a class or a docstring."""
    text = helps[subcommand]
    assert text.startswith(f"usage: lightning-normreg {subcommand} ")
    groups = re.split(r"\n\n(?=\S)", text)
    for group in groups:
        assert len(group.splitlines()) <= LINES, group
        assert all(len(line) <= COLUMNS for line in group.splitlines()), group
        assert "<class" not in group.splitlines()[0]
    assert examples(text)


@pytest.mark.parametrize(
    "subcommand, takes", [("fit", True), ("inspect", True), ("plan", True), ("plan --as angle", False)]
)
def test_usage_names_a_config_where_there_is_one(
    subcommand: str, takes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe is given to ``plan --as`` by ``--recipe``: it has no ``--config``."""
    text = help_of([*subcommand.split(), "--help"], capsys)
    assert ("[--config FILE]" in text) == ("--config" in text.partition("\n")[2]) == takes


@pytest.mark.parametrize("key", ["trainer", "monitor", "projection", "decay", "optimizer"])
def test_what_a_group_takes(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--KEY.help`` lists it, from the docstrings of what it makes."""
    text = " ".join(help_of(["fit", f"--{key}.help", *["AdamW"] * (key == "optimizer")], capsys).split())
    known = {
        "trainer": "--trainer.max_epochs MAX_EPOCHS Stop training once",
        "monitor": "--monitor.every_n_steps EVERY_N_STEPS Batches between logged ones",
        "projection": '--projection.radius RADIUS ``"auto"``: 1 for a neuron',
        "decay": "--decay.gamma GAMMA Decay of the gains of normalizations.",
        "optimizer": "--optimizer.weight_decay WEIGHT_DECAY",
    }
    assert known[key] in text
    assert "--decay.module" not in text


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a subcommand all are listed, each with a line."""
    for words in (["--help"], []):
        lines = help_of(words, capsys).splitlines()
        assert [line.split()[0] for line in lines if re.match(r"  \w+ +[A-Z].*\.$", line)] == SUBCOMMANDS


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """That of the package, and of what it runs on, in a line."""
    line = help_of(["--version"], capsys)
    assert line.startswith(f"lightning-normreg {lightning_normreg.__version__} (Python {platform.python_version()}, ")
    assert f"torch {torch.__version__}, pytorch-lightning {pytorch_lightning.__version__}" in line
    assert line.count("\n") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:No seed found")
def test_examples_run_as_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the subcommands, for some go on where ``fit`` ended."""
    for subcommand in SUBCOMMANDS:
        for words in examples(help_of([subcommand, "--help"], capsys)):
            cli.main(words)
    assert len(list(Path("lightning_logs").glob("version_*/config.yaml"))) >= len(SUBCOMMANDS)
