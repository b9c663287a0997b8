"""What the documents show of the command line runs as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_normreg import cli, find_symmetries
from lightning_normreg.demos import DemoConvNet, DigitsDataModule

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> list[tuple[str, str]]:
    """What stands in the blocks for the console, each with the output that is shown."""
    consoles = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    pattern = r"^(?:\$ )?lightning-normreg (.*)\n((?:(?!lightning-normreg)(?!\$ ).*\n)*)"
    return [found for block in consoles for found in re.findall(pattern, block, re.MULTILINE)]


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_yaml_of_the_page(number: int, folder: Path) -> None:
    """Each block trains."""
    Path("block.yaml").write_text(BLOCKS[number])
    cli.main(["fit", "--config", "block.yaml", "--seed_everything=0"])
    (saved,) = folder.glob("lightning_logs/version_0/config.yaml")
    config: dict[str, Any] = yaml.safe_load(saved.read_text())
    assert config["model"]["class_path"] == "lightning_normreg.demos.DemoConvNet"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No seed found")
def test_commands_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order: the first trains, and others show what the page shows, but for the digits."""
    data = DigitsDataModule()
    data.setup("fit")
    find_symmetries(DemoConvNet(), next(iter(data.train_dataloader()))).save("found.json")
    for command, shown in commands_of(PAGE):
        words = shlex.split(command)
        capsys.readouterr()
        cli.main([*words, "--seed_everything=0"] if words[0] == "fit" else words)
        if shown:
            assert _without_digits(capsys.readouterr().out) == _without_digits(shown), command
    assert len(list(folder.glob("lightning_logs/version_*"))) == 1
    assert Path("curves.png").exists()
    assert len([shown for _, shown in commands_of(PAGE) if shown]) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No seed found")
def test_commands_of_the_page_on_plans(folder: Path) -> None:
    """In their order: a plan, a run beside it, both drawn, and a plan from its checkpoint."""
    for command, _ in commands_of((ROOT / "docs" / "planning.md").read_text()):
        cli.main(shlex.split(command))
    assert {"plan.json", "plan.png", "curves.png"} <= {path.name for path in folder.iterdir()}


def _without_digits(text: str) -> list[str]:
    return re.sub(r"[\d.]+(e-?\d+)?", "N", re.sub(r"[━─]+", "", text)).split()


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command in the first line of the file, with fewer epochs."""
    (command,) = re.findall(r"^# lightning-normreg (.*)$", path.read_text(), re.MULTILINE)
    words = shlex.split(command.replace("examples/", f"{path.parent}/"))
    cli.main([*words, "--seed_everything=0", "--trainer.max_epochs=1"])


def test_the_example_is_the_one_on_the_page() -> None:
    """A file to start from, and the text that explains it."""
    assert (ROOT / "examples" / "adamw_warmup_cosine.yaml").read_text().partition("\n")[2] == BLOCKS[0]
