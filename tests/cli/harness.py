"""Run the command line in this process, and read what a run left behind."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_normreg import cli

TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
}


def fit(config: dict[str, Any], *args: str, module: str = "users_module") -> Path:
    """Train the user's module by a YAML file alone, and return the folder of the logs."""
    base = {"model": f"{module}.Net", "data": f"{module}.Data", "seed_everything": 0}
    trainer = TRAINER | config.get("trainer", {})
    Path("config.yaml").write_text(yaml.safe_dump(base | config | {"trainer": trainer}))
    cli.main(["fit", "--config", "config.yaml", *args])
    return max(Path("lightning_logs").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def groups(run: Path) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer that trained, from its checkpoint."""
    (path,) = (run / "checkpoints").iterdir()
    found: list[dict[str, Any]] = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    return found


def logged(run: Path, tag: str) -> list[float]:
    """Values of a curve, in the order of steps."""
    with open(run / "metrics.csv", newline="") as file:
        return [float(row[tag]) for row in csv.DictReader(file) if row.get(tag)]
