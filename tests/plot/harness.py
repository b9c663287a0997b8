"""Histories with known shapes, and what a page draws of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.text import Text
from matplotlib.transforms import Bbox

STATISTICS = {"min": np.min, "median": np.median, "max": np.max}
SUMMARIES = {
    "unit_norm_rms": "unit_norm_rms",
    "rotation": "rotation",
    "equilibrium_ratio": "equilibrium_ratio",
    "effective_lr": "effective_lr_ratio",
}


def name_of(layer: int, layers: int) -> str:
    """Short names in small models, long ones in deep ones."""
    if layers <= 8:
        return f"block{layer}.conv.weight"
    return f"model.encoder.layers.{layer}.attention.self.value.weight"


def history(layers: int, *, rows: int = 40, seed: int = 0, shown: range | None = None, lr: float = 0.1) -> pd.DataFrame:
    """Norms that decay, rotations around their equilibrium; the last of several layers is not scale-invariant.

    Args:
        layers: In the model.
        rows: Logged steps, each fifth.
        seed: Of the noise.
        shown: Layers that have curves; the summaries are over all.
        lr: At the start of a cosine.
    """
    random = np.random.default_rng(seed)
    steps = np.arange(rows) * 5
    rate = lr * (0.505 + 0.495 * np.cos(np.pi * steps / steps[-1])) if rows > 1 else np.array([lr])
    all_curves: dict[str, list[Any]] = {key: [] for key in SUMMARIES}
    found: dict[str, Any] = {"step": steps, "epoch": steps // 50}
    for layer in range(layers):
        norm = 0.4 + 0.3 * layer / layers + (1 + random.random()) * np.exp(-steps / 60)
        rotation = np.sqrt(0.02 * rate) * np.exp(0.2 * random.standard_normal(rows))
        curves = {"unit_norm_rms": norm, "weight_norm": 4 * norm, "rotation": rotation}
        if layer < layers - 1 or layers == 1:
            curves["effective_lr"] = rate / norm**2
            curves["equilibrium_rotation"] = np.sqrt(0.02 * rate)
            curves["equilibrium_norm"] = np.full(rows, 0.4 + 0.3 * layer / layers)
            curves["equilibrium_ratio"] = rotation / np.sqrt(0.02 * rate)
        else:
            curves["effective_lr_not_invariant"] = rate / norm**2
        for key in SUMMARIES.keys() & curves.keys():
            all_curves[key].append(curves[key] / (curves[key][0] if key == "effective_lr" else 1))
        if shown is None or layer in shown:
            found |= {f"weights/{key}/{name_of(layer, layers)}": values for key, values in curves.items()}
    for key, summary in SUMMARIES.items():
        for name, statistic in STATISTICS.items():
            found[f"weights/layers/{summary}_{name}"] = statistic(np.array(all_curves[key]), axis=0)
    return pd.DataFrame(found)


@contextmanager
def drawn_texts() -> Iterator[list[tuple[str, Bbox]]]:
    """Every text that is really drawn meanwhile, with its box."""
    found: list[tuple[str, Bbox]] = []
    original = Text.draw

    def draw(self: Text, renderer: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), self.get_window_extent(renderer)))
        original(self, renderer)

    Text.draw = draw  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Text.draw = original  # type: ignore[method-assign]


def overlaps(texts: list[tuple[str, Bbox]]) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share some area."""
    found = []
    for place, (first, one) in enumerate(texts):
        for second, other in texts[place + 1 :]:
            shared = Bbox.intersection(one, other)
            if shared is not None and shared.width * shared.height > 0:
                found.append((first, second))
    return found
