"""Results: one file per finished cell, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.van_laarhoven.grid import Cell, Settings

Result = dict[str, Any]


class Store:
    """A folder of results of cells that share their settings. Processes may write to it at once."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder.resolve()
        # Seeds and grid may grow: what a cell is does not depend on which others there are.
        grown = ("seeds", "lrs_sgd", "lrs_adam", "decays_sgd", "decays_adam")
        mine = {key: value for key, value in json.loads(json.dumps(asdict(settings))).items() if key not in grown}
        path = self.folder / "settings.json"
        if path.exists():
            theirs = json.loads(path.read_text())
            if theirs != mine:
                odd = [f"{key} {theirs.get(key)!r}, now {mine[key]!r}" for key in mine if theirs.get(key) != mine[key]]
                raise ValueError(f"`out` must be a folder for these settings, got {folder}, whose cells have "
                                 f"{'; '.join(odd)}. Use another folder.")  # fmt: skip
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(mine))

    def path(self, cell: Cell) -> Path:
        """File of a cell."""
        return self.folder / "cells" / f"{cell.name}.json"

    def add(self, cell: Cell, result: Result) -> None:
        """Keep the result of a cell."""
        self.path(cell).parent.mkdir(exist_ok=True)
        write(self.path(cell), json.dumps(result))

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Cells that have no result yet."""
        return [cell for cell in cells if not self.path(cell).exists()]

    def load(self, cells: Iterable[Cell]) -> dict[Cell, Result]:
        """Results of cells that have one."""
        return {cell: json.loads(self.path(cell).read_text()) for cell in cells if self.path(cell).exists()}


def write(path: Path, text: str) -> None:
    """Write a file so that it is there in full or not at all, whenever the process or the machine stops."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
