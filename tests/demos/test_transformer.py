from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from lightning_normreg.demos import DemoTransformer, TextDataModule
from tests.harness import trainer

WRITERS = ("embedding.weight", ".o.weight", ".down.weight")


def model_and_tokens() -> tuple[DemoTransformer, Tensor]:
    """A small one in double precision with a negligible eps, and eight sequences."""
    torch.manual_seed(0)
    model = DemoTransformer(width=16, heads=2).double()
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 1e-20
    return model, torch.randint(96, (8, 12))


@torch.no_grad()
def moved(writers: tuple[str, ...]) -> float:
    """By how much logits change, relative to their size, when all tensors whose names end so are multiplied by 3."""
    model, tokens = model_and_tokens()
    before = model(tokens)
    for name, parameter in model.named_parameters():
        if name.endswith(writers):
            parameter.mul_(3)
    return float((model(tokens) - before).norm() / before.norm())


def test_what_writes_to_the_stream_is_scale_invariant_together() -> None:
    """And no kind of it alone.

    What is left is roundoff, 1e-16 for each of some twenty operations in a row, at most 2e-15 together; eps is 1e-16 of
    the stream's mean square. Alone, branches count three times as much in the stream, or a third: they are tenths.
    """
    assert moved(WRITERS) < 1e-14
    assert min(moved((writer,)) for writer in WRITERS) > 0.01


@torch.no_grad()
def test_a_character_sees_those_before_it_and_their_order() -> None:
    """Later ones do nothing; earlier ones that change places do something, though the last is the same."""
    model, tokens = model_and_tokens()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(5 if parameter.ndim > 1 else 1)  # else attention is nearly uniform
    later, swapped = tokens.clone(), tokens.clone()
    later[:, 6:] = (later[:, 6:] + 1) % 96
    swapped[:, :11] = tokens[:, :11].flip(1)
    logits = model(tokens)
    assert logits.shape == (8, 12, 96)
    assert torch.equal(model(later)[:, :6], logits[:, :6])
    assert (model(swapped)[:, -1] - logits[:, -1]).abs().max() > 1e-6


class Rates(Callback):
    """Learning rates of all steps."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Keep the coming step's."""
        (rate,) = {group["lr"] for group in trainer.optimizers[0].param_groups}
        self.seen.append(rate)


@pytest.mark.parametrize("steps, peak", [(20, 5), (6, 3), (1, 0)])
def test_learning_rates_and_decay(steps: int, peak: int) -> None:
    """Straight up for ``warm_up`` steps or half of the run, then down to nearly a tenth; only matrices decay."""
    torch.manual_seed(0)
    model, rates = DemoTransformer(lr=0.01, weight_decay=0.2, warm_up=5, width=16, heads=2), Rates()
    fit = trainer(rates, max_steps=steps, limit_val_batches=0)
    fit.fit(model, TextDataModule(batch_size=4, context=8))
    assert len(rates.seen) == steps
    up = [0.01 * (1 / peak + (1 - 1 / peak) * k / peak) for k in range(peak)]
    down = [0.001 + 0.009 * (1 + math.cos(math.pi * k / (steps - peak))) / 2 for k in range(steps - peak)]
    assert rates.seen == pytest.approx(up + down)
    decays = {p: g["weight_decay"] for g in fit.optimizers[0].param_groups for p in g["params"]}
    assert all(decays[p] == (0.2 if p.ndim > 1 else 0) for p in model.parameters())


def test_heads_that_do_not_fit() -> None:
    """Rotary positions turn pairs."""
    with pytest.raises(ValueError, match=r"`width` must be a multiple of twice `heads`, got 12 and 4\."):
        DemoTransformer(width=12)
