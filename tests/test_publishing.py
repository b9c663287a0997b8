"""What is published: one address, links that hold on the package index, and the files that checks are made with."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import lightning_normreg

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").iterdir()}
LINK = re.compile(r"\]\(([^)]+)\)")


def build_script() -> Any:
    """The module that hatchling reads."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_repository_has_one_address() -> None:
    """Files that no tool fills in say that of pyproject.toml."""
    for name in ("mkdocs.yml", "CITATION.cff", "SECURITY.md", ".github/ISSUE_TEMPLATE/config.yml"):
        found = re.findall(r"https://github\.com/[\w-]+/[\w-]+", (ROOT / name).read_text())
        assert {*found} == {REPOSITORY}, name


def test_links_of_the_long_description_are_absolute() -> None:
    """Those of the README that lead to files do so at the tag; all others stay as they are."""
    readme = (ROOT / "README.md").read_text()
    before = LINK.findall(readme)
    text = build_script().absolute_links(readme, "https://github.com/me/it", "1.2.3")
    raw = "https://raw.githubusercontent.com/me/it/v1.2.3/"
    ours = {target: raw if target.endswith(".png") else "https://github.com/me/it/blob/v1.2.3/" for target in before}
    assert LINK.findall(text) == [target if target.startswith("https:") else ours[target] + target for target in before]
    assert sum(target.startswith(raw) for target in LINK.findall(text)) >= 1
    assert LINK.sub("", text) == LINK.sub("", readme)


def test_the_source_distribution_is_whole() -> None:
    """What the README and CONTRIBUTING speak of is in it."""
    patterns = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    linked = [target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text())]
    needed = {"Makefile", "mkdocs.yml", "constraints.txt", "hatch_build.py", ".github/workflows/ci.yml", "CITATION.cff"}
    for name in needed | {target for target in linked if not target.startswith("https:")}:
        assert (ROOT / name).exists(), name
        first = f"/{name.partition('/')[0]}"
        assert any(fnmatch.fnmatchcase(first, pattern) for pattern in patterns), name


def test_declared_versions_of_python_are_tested() -> None:
    """Classifiers are in the matrix, whose lowest and highest are also run with the bounds of all dependencies."""
    start = "Programming Language :: Python :: 3."
    declared = [entry.rpartition(" ")[2] for entry in PROJECT["project"]["classifiers"] if entry.startswith(start)]
    jobs = WORKFLOWS["ci"]["jobs"]
    tested = jobs["tests"]["strategy"]["matrix"]["python"]
    assert {*declared} <= {*tested}
    assert PROJECT["project"]["requires-python"] == f">={declared[0]}"
    bounds = {row["resolution"]: row["python"] for row in jobs["versions"]["strategy"]["matrix"]["include"]}
    assert bounds == {"lowest-direct": declared[0], "highest": tested[-1]}


def test_workflows_name_what_is_there() -> None:
    """Targets of make exist, jobs that others need exist, and only publishing and the pages may ask for an identity."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, workflow in WORKFLOWS.items():
        for job in workflow["jobs"].values():
            assert {job["needs"]} <= workflow["jobs"].keys() if "needs" in job else True
            called = [
                step["run"].split()[1] for step in job.get("steps", ()) if step.get("run", "").startswith("make ")
            ]
            assert {target for target in called if target != "${{"} <= targets, name
        assert ("id-token" in str(workflow)) == (name in ("publish", "pages"))


def test_the_citation_is_of_this_version() -> None:
    """And the changelog has a place for the next."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lightning_normreg.__version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
