# One virtual environment for everything; each target completes it with the extras that it needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
SCHEMA := $(BIN)/check-jsonschema --builtin-schema vendor

.PHONY: demo test test-slow check lint docs benchmark clean

demo: .venv/with-demo
	$(BIN)/lightning-normreg demo

test: .venv/with-test
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/with-test
	$(BIN)/python -m pytest -m slow

check: lint docs

lint: .venv/with-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell lightning_normreg tests examples docs .github *.md *.cff *.py
	$(SCHEMA).github-workflows .github/workflows/*.yml
	$(SCHEMA).github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/wish.yml
	$(SCHEMA).citation-file-format CITATION.cff
	$(BIN)/mypy

docs: .venv/with-docs
	$(BIN)/mkdocs build --strict

benchmark: .venv/with-test
	$(BIN)/python -m tests.benchmarks.step_cost
	$(BIN)/python -m tests.benchmarks.alternatives --memory --scaling

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/with-%: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) ".[$*]"
	touch $@

.venv/bin/pip:
	$(PYTHON) -m venv .venv
