"""``lightning-normreg plot``: a file of the kind that was asked for, or the key and the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_normreg import cli
from tests.plot.harness import history


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run beneath the present folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs" / "version_0").mkdir(parents=True)
    history(3, rows=5).to_csv("logs/version_0/metrics.csv")
    return "logs/version_0"


@pytest.mark.parametrize(
    "name, start", [("curves.png", b"\x89PNG"), ("page.svg", b"<?xml"), ("page.pdf", b"%PDF"), ("UP.PNG", b"\x89PNG")]
)
def test_kinds_of_files(name: str, start: bytes, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The name of the file says which; it is told where the page is, and what is on it."""
    cli.main(["plot", run, *([] if name == "curves.png" else ["--output", name])])
    assert Path(name).read_bytes().startswith(start)
    assert capsys.readouterr().out == f"{name}: {run}\n"


def test_titles_layers_and_several_runs(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SVG keeps words as such: the title, the layers that were chosen, and no others."""
    shutil.copytree(run, "logs/version_1")
    words = ["--layers", "block0*", "--layers", "block1*", "--title", "a title"]
    cli.main(["plot", "logs", *words, "--output", "page.svg"])
    assert capsys.readouterr().out == "page.svg: logs/version_0, logs/version_1\n"
    found = Path("page.svg").read_text()
    for word in ("a title", "version_0", "version_1", "block0.conv.weight", "block1.conv.weight"):
        assert f"<!-- {word} -->" in found
    assert "block2" not in found
    cli.main(["plot", run, "--output", "page.svg"])
    assert f"<!-- {run} -->" in Path("page.svg").read_text()


@pytest.mark.parametrize(
    "words, key, remedy",
    [
        ([], "RUN", "required"),
        (["none"], "RUN: There is no 'none'", "lightning_logs/version_0"),
        (["logs", "--layers", "conv9*"], "--layers: ", "Near misses: 'block0.conv.weight'"),
        (["logs", "--output", "curves.gif"], "--output: must end in .png, .svg, .pdf", "'curves.gif'"),
        (["logs", "--output", "no/curves.png"], "--output: there is no folder 'no'", "Make it first"),
        (["logs", "--output", "folder.png"], "--output: ", "folder.png"),
        (["logs", "--lay", "x"], "--lay", "unrecognized"),
    ],
)
def test_errors(words: list[str], key: str, remedy: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line."""
    Path("folder.png").mkdir()
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["plot", *words])
    said = capsys.readouterr().err.partition("\nerror: ")[2]
    assert key in said
    assert remedy in said
    assert len(said.splitlines()) == 1


def test_without_the_extra(run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["plot", run])
    assert 'pip install "lightning-normreg[plot]"' in capsys.readouterr().err
