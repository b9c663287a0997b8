"""The documents say what the code does: blocks run, links and pictures are there, cards are complete."""

from __future__ import annotations

import importlib.util
import re
import shlex
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lightning_normreg import cli
from lightning_normreg._metrics import markdown_table
from lightning_normreg.cli._plot import make_parser
from tests.benchmarks import decay_table
from tests.cli.conftest import USERS_MODULE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LARGEST_PICTURE = 100_000
CARD = ["When to use it", "When not", "What it costs", "What it logs", "How to tune it", "Sources"]
FEATURES = {
    "callbacks.md": [
        "EffectiveLRMonitor",
        "WeightNormMonitor",
        "NormProjection",
        "RotationControl",
        "CorrectedDecay",
        "NormSummary",
    ],
    "decay_groups.md": ["Decay groups"],
    "invariance.md": ["Scale invariance"],
    "equilibrium.md": ["Recipes without decay"],
    "optimizers.md": ["Rescaling a weight that trains"],
}
"""Pages with a method card under each of these headings."""


class Block(NamedTuple):
    """A fenced block of a page; ``mark`` is the reason why it is not run, written in a comment right above it."""

    language: str
    code: str
    mark: str


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of one language, in order."""
    fence = re.compile(r"^(?:<!-- not run: (.*?) -->\n)?```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [Block(m[2], m[3], m[1] or "") for m in fence.finditer(page.read_text())]
    return [block for block in found if block.language == language]


def pictures() -> Any:
    """The script that draws them."""
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_blocks(language: str) -> Any:
    """Parametrize over the pages that have such blocks."""
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the project that the pages call the reader's own."""
    users = USERS_MODULE.replace("class Net(", "class Model(").replace("(Net)", "(Model)")
    (tmp_path / "my_project.py").write_text(users.format(namespace="pytorch_lightning"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.slow
@with_blocks("python")
def test_python_runs(page: Path) -> None:
    """The blocks of a page run in order as one script; those that are marked compile."""
    torch.manual_seed(0)
    script: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), 1):
        code = compile(block.code, f"{page.name}, block {number}", "exec")
        if not block.mark:
            exec(code, script)


@pytest.mark.slow
@with_blocks("yaml")
def test_yaml_is_what_the_command_line_takes(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every class, argument and value is known; tests/cli trains those of the page on the command line."""
    for block in blocks(page, "yaml"):
        Path("block.yaml").write_text(block.code)
        parse(["fit", "--config", "block.yaml"])


def parse(words: list[str]) -> None:
    """Let the command line read its arguments, and go no further."""
    with pytest.raises(SystemExit) as done:
        cli.main([*words, "--print_config"])
    assert done.value.code == 0, words


@pytest.mark.slow
@with_blocks("console")
def test_commands_are_there(page: Path) -> None:
    """The package's own are parsed; files, targets of make and extras that others name exist."""
    for block in blocks(page, "console"):
        lines = block.code.replace("\\\n", " ").splitlines()
        typed = [line[2:] for line in lines if line.startswith("$ ")]  # the others are what the terminal shows
        for line in typed or lines:
            program, *words = shlex.split(line, comments=True) or ["#"]
            program = program.rpartition("/")[2]
            if program == "lightning-normreg" and words[0] == "plot":
                make_parser().parse_args(words[1:])
            elif program == "lightning-normreg" and words[0] in ("inspect", "plan"):
                assert page.name in ("cli.md", "planning.md"), "tests/cli runs those of these pages"
            elif program == "lightning-normreg":
                parse(words)
            elif program == "make":
                targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert {*words} <= {name for target in targets for name in target.split()}, line
            elif program in ("python", "python3") and words[0] != "-m":
                assert (ROOT / words[0]).exists() or words[0].startswith("my_"), line
            else:
                assert program in ("#", "python3", "python", "pip", "tensorboard", "git"), line


def test_all_blocks_are_seen() -> None:
    """Each fence starts a line and has a language that is checked, and each mark a reason and a block."""
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^ *```.*$", text, re.MULTILINE)
        seen = sum(len(blocks(page, language)) for language in ("python", "yaml", "console", "text"))
        assert len(fences) == 2 * seen, page.name
        marked = sum(bool(b.mark.strip()) for language in ("python", "yaml", "console") for b in blocks(page, language))
        assert len(re.findall(r"^<!-- not run", text, re.MULTILINE)) == marked, page.name


def test_the_table_of_curves_is_the_one_in_the_code() -> None:
    """docs/curves.md holds the table that the code derives everything from."""
    assert markdown_table() in (DOCS / "curves.md").read_text()


@pytest.mark.slow
def test_the_table_of_decay_is_what_its_command_prints() -> None:
    """docs/decay.md holds the table that was computed."""
    assert decay_table.markdown() in (DOCS / "decay.md").read_text()


@pytest.mark.parametrize("page", FEATURES)
def test_cards_are_complete(page: str) -> None:
    """Each feature has a card, and every card has the same rows."""
    text = (DOCS / page).read_text()
    for feature in FEATURES[page]:
        assert re.search(rf"^#+ {feature}\n(?:(?!^#).*\n)*?\| \*\*{CARD[0]}\*\*", text, re.MULTILINE), feature
    rows = re.findall(r"^\| \*\*(.*?)\*\* \| \S", text, re.MULTILINE)
    assert rows == CARD * (len(rows) // len(CARD))


def test_links_between_the_files_hold() -> None:
    """Every relative link of the README and the pages points to a file, and to a heading that is in it."""
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {target}#{anchor}"


def slug(heading: str) -> str:
    """The anchor that the site makes of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower())


def test_every_picture_has_a_source() -> None:
    """They are those of docs/pictures.py, two of the experiment, one beside a table, and a shot by tests/pictures.

    All are shown, and small.
    """
    names = {path.name for path in (DOCS / "images").iterdir()}
    others = {"decay.png", "tensorboard.png", "experiment_error.png", "experiment_time.png"}
    assert names == others | {f"{name}.png" for name in pictures().PICTURES}
    text = "\n".join(page.read_text() for page in PAGES)
    assert {name for name in names if f"images/{name}" not in text} == set()
    assert max((DOCS / "images" / name).stat().st_size for name in names) < LARGEST_PICTURE


@pytest.mark.slow
@pytest.mark.parametrize("name", pictures().PICTURES)
def test_pictures_are_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From runs of an epoch: the script works, and every panel of a picture has a curve."""
    script = pictures()
    monkeypatch.setattr(script, "EPOCHS", 1)
    monkeypatch.setattr(script, "STEPS", 20)
    warnings.filterwarnings("ignore", "The Trainer has no logger")
    warnings.filterwarnings("ignore", "From here on no equilibrium is predicted")  # for layers that start too small
    assert all(axes.lines for axes in script.PICTURES[name]().axes)
