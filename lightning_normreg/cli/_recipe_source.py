"""A recipe from a YAML of ``fit``, or from what ``convert --json`` has written."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_normreg.cli._recipe import Recipe, from_plain
from lightning_normreg.cli._schedulers import MakeScheduler, natural_interval

_LEFT_OUT = ("params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize")


def read_recipe(path: str, steps: int | None, steps_per_epoch: int | None) -> Recipe:
    """What a YAML of ``fit``, whose schedule is followed for so many steps, or a JSON of ``convert`` says."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path!r} must hold a mapping, got {type(content).__name__}.")
    if "form" in content:
        return from_plain(content)
    return _of_config(content.get("fit") or content, steps, steps_per_epoch)


def _of_config(config: Mapping[str, Any], steps: int | None, steps_per_epoch: int | None) -> Recipe:
    name, given = _class_and_arguments(config.get("optimizer"), "optimizer")
    module, _, short = name.rpartition(".")
    try:
        optimizer_class = getattr(import_module(module or "torch.optim"), short)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"optimizer: {error}. Name a class of torch.optim, or another as package.Class.") from error
    defaults = inspect.signature(optimizer_class).parameters
    settings = {k: p.default for k, p in defaults.items() if p.default is not p.empty} | given
    lr, decay = float(settings["lr"]), float(settings.get("weight_decay", 0.0))
    rates: float | list[float] = lr
    if config.get("lr_scheduler"):
        if steps is None:
            raise ValueError(
                "it has an lr_scheduler. Say by --steps how many steps of it to convert to a schedule; for a "
                "projection give its largest rate by --lr, without the file."
            )
        rates = _followed(config, optimizer_class, settings, steps, steps_per_epoch)
    elif steps is not None:
        rates = [lr] * steps
    own = {key: value for key, value in settings.items() if key not in _LEFT_OUT}
    projection = config.get("projection")
    radius = projection.get("radius", "auto") if isinstance(projection, Mapping) else None
    if isinstance(projection, Mapping) or projection is True:
        if not isinstance(radius, int | float):
            raise ValueError(f"projection.radius: a number is needed, got {radius!r}.")
        return Recipe("projection", name, rates, 0.0, float(radius), own)
    return Recipe("decay", name, rates, decay, None, own)


def _class_and_arguments(entry: Any, key: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and isinstance(entry.get("class_path"), str):
        return entry["class_path"], {**(entry.get("init_args") or {}), **(entry.get("dict_kwargs") or {})}
    raise ValueError(f"{key}: there is none, or without class_path. Give the recipe by --optimizer, --lr and so on.")


def _followed(
    config: Mapping[str, Any], optimizer_class: Any, settings: dict[str, Any], steps: int, steps_per_epoch: int | None
) -> list[float]:
    """Learning rate of each step, by running the schedule on a parameter that nothing moves."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--lr_scheduler", type=MakeScheduler)
    try:
        make = parser.instantiate_classes(parser.parse_object({"lr_scheduler": config["lr_scheduler"]})).lr_scheduler
    except Exception as error:
        raise ValueError(f"lr_scheduler: {' '.join(str(error).split())[:300]}") from error
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    arguments = {k: v for k, v in settings.items() if k in inspect.signature(optimizer_class).parameters}
    optimizer = optimizer_class([parameter], **arguments)
    scheduler = make(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("lr_scheduler: ReduceLROnPlateau follows a metric, so its rates are not known beforehand.")
    by_step = (config.get("lr_interval") or natural_interval(scheduler)) == "step"
    if not by_step and steps_per_epoch is None:
        raise ValueError("lr_scheduler: it goes by epochs. Say by --steps_per_epoch how many steps one has.")
    (group,) = optimizer.param_groups
    momentum = [group.get(key) for key in ("momentum", "betas")]
    rates = []
    for step in range(1, steps + 1):
        rates.append(float(group["lr"]))
        if momentum != [group.get(key) for key in ("momentum", "betas")]:
            raise ValueError(
                "lr_scheduler: it changes the momentum too, for which there is no conversion. Set cycle_momentum: "
                "false."
            )
        optimizer.step()
        if by_step or step % (steps_per_epoch or 1) == 0:
            scheduler.step()
    return rates
