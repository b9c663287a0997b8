"""Pairs, of which only the product counts: what no function sees, and what no symmetry changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_normreg import Symmetries, WeightNormMonitor, find_symmetries
from tests.callbacks.sets import Stream, fitted, samples
from tests.symmetries._small_models import GPT, HEADS, LLAMA, QWEN, Kind

pytestmark = pytest.mark.filterwarnings("ignore:The Trainer has no logger")  # the history is read instead


def values(model: Stream, symmetries: Symmetries, start: str) -> dict[str, float]:
    """Of the first step, by pair."""
    monitor = WeightNormMonitor(symmetries=symmetries, products=True)
    fitted(model, monitor)
    row: dict[str, Any] = monitor.history().iloc[0].to_dict()
    return {tag.removeprefix(start): value for tag, value in row.items() if tag.startswith(start)}


def made(kind: Kind = LLAMA) -> Stream:
    """The same each time."""
    torch.manual_seed(0)
    return Stream(kind, depth=1).double().train()


def test_balance_is_that_of_the_norms() -> None:
    """Of pairs of two matrices, by hand: queries and keys, values and output, up and down."""
    model = made()
    found = values(model, find_symmetries(model, next(iter(samples()))), "weights/balance/net.blocks.0.")
    before, _ = model.steps[0]
    expected = {}
    for first, second in (("q", "k"), ("v", "o"), ("up", "down")):
        norms = [float(before[f"net.blocks.0.{name}.weight"].norm()) for name in (first, second)]
        expected[f"{first}.weight_vs_{second}.weight"] = math.log(norms[0] / norms[1])
    assert found == pytest.approx(expected, rel=1e-12)


def by_hand(model: Stream) -> float:
    """√(Σ ‖(W_q γ)_c‖²‖(W_k γ)_c‖²) over channels: without rotary positions each may be rescaled by itself."""
    weights: dict[str, Tensor] = model.steps[0][0]
    gain = weights["net.blocks.0.norm1.weight"]
    q, k = (weights[f"net.blocks.0.{name}.weight"] * gain for name in "qk")
    return math.sqrt(sum(float(a.square().sum() * b.square().sum()) for a, b in zip(q, k, strict=True)))


def test_products_are_what_no_symmetry_changes() -> None:
    """Every symmetry found is applied, each by another factor: balances move, products stay to rounding."""
    model = made()
    symmetries = find_symmetries(model, next(iter(samples())))
    found = values(model, symmetries, "weights/product/")
    assert set(found) == {"net.blocks.0.q.weight_vs_k.weight", "net.norm.weight_vs_head.weight"}
    assert found["net.blocks.0.q.weight_vs_k.weight"] == pytest.approx(by_hand(model), rel=1e-12)
    moved = made()
    with torch.no_grad():
        for number, symmetry in enumerate(symmetries.basis):
            for name, power in symmetry.exponents.items():
                moved.get_parameter(name).mul_((1.1 + 0.1 * number) ** power)
        # Of one head alone as well: its queries and keys.
        size = len(moved.net.blocks[0].q.weight) // HEADS
        moved.net.blocks[0].q.weight[:size] *= 3
        moved.net.blocks[0].k.weight[:size] /= 3
        # And of one channel: the final gain and what reads it, or the first one with its queries, keys and values.
        for gain, readers in ((moved.net.norm, [moved.net.head]), (moved.net.blocks[0].norm1, "qkv")):
            gain.weight[1] *= 5
            for reader in readers:
                part = getattr(moved.net.blocks[0], reader) if isinstance(reader, str) else reader
                part.weight[:, 1] /= 5
    batch = next(iter(samples()))
    with torch.no_grad():
        assert float((moved(batch) - made()(batch)).abs().max()) < 1e-12
    assert values(moved, symmetries, "weights/product/") == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("kind, products", [(QWEN, {"q_norm.weight_vs_k_norm.weight"}), (GPT, set())])
def test_of_other_kinds(kind: Kind, products: set[str]) -> None:
    """Behind a normalization of queries and keys only its gains count; of fused weights there is no pair of tensors."""
    model = made(kind)
    found = values(model, find_symmetries(model, next(iter(samples(kind)))), "weights/product/net.blocks.0.")
    assert set(found) == products
