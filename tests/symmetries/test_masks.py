"""Weights under a fixed mask, as in autoregressive flows: what the loss never sees is noticed, and said."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_normreg import (
    EffectiveLRMonitor,
    NormSummary,
    WeightNormMonitor,
    find_scale_invariance,
    load_verdict,
    save_verdict,
)
from tests.callbacks.test_verdict import Any2d
from tests.harness import RecordingLogger, loader, trainer


class Masked(nn.Linear):
    """A quarter of its entries is kept."""

    def __init__(self, into: int, out: int, how: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__(into, out, bias=False)
        kept = torch.arange(into * out).view(out, into) % 4 == torch.arange(out)[:, None] % 4
        self.register_buffer("mask", kept)
        self.how = how or (lambda mask, weight: mask * weight)

    def forward(self, x: Tensor) -> Tensor:
        """With the mask on."""
        return F.linear(x, self.how(self.mask, self.weight))


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Of some outputs."""
    return module(batch).exp().mean()


def net(first: nn.Module) -> nn.Module:
    """With a BatchNorm behind it."""
    return nn.Sequential(first, nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def shares(module: nn.Module, samples: int = 8) -> dict[str, float]:
    """What is found to be masked."""
    found = find_scale_invariance(module, torch.randn(samples, 8), forward=loss)
    return {name: verdict.masked for name, verdict in found.items() if verdict.masked}


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mask * weight": lambda mask, weight: mask * weight,
    "weight * mask.float()": lambda mask, weight: weight * mask.to(weight),
    "masked_fill": lambda mask, weight: weight.masked_fill(~mask, 0.0),
    "where": lambda mask, weight: torch.where(mask, weight, 0.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_fixed_mask_is_found(way: str) -> None:
    """Three quarters of the entries, however the mask is put on; the units are rows as without one."""
    torch.manual_seed(0)
    module = net(Masked(8, 12, WAYS[way]))
    assert shares(module) == {"0.weight": 0.75}
    assert find_scale_invariance(module, torch.randn(8, 8), forward=loss)["0.weight"].kind == "neuron"


def test_pruned_and_triangular_weights() -> None:
    """As torch's pruning does it, and above a diagonal."""
    torch.manual_seed(0)
    pruned = prune.random_unstructured(nn.Linear(8, 12, bias=False), "weight", amount=0.5)
    assert shares(net(pruned)) == {"0.weight_orig": 0.5}
    module = nn.Sequential(Masked(8, 8, lambda _, weight: weight.tril()), nn.Tanh(), nn.Linear(8, 3))
    assert shares(module) == {"0.weight": pytest.approx(28 / 64)}


@pytest.mark.parametrize("samples", [2, 3])
def test_what_only_these_samples_do_not_reach_is_no_mask(samples: int) -> None:
    """ReLUs that are off, words that are not there, random masks, and gains: of none of them anything is said."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.gain = nn.Embedding(50, 8), nn.Parameter(torch.rand(12, 8))
            self.layers = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.relu() + self.table((x[:, 0] > 0).long())
            dropped = torch.rand(12, 8, dtype=x.dtype) < 0.5
            return self.layers(x) + F.linear(x, self.gain * dropped)[:, :3] + F.linear(x, 0.5 * self.gain)[:, 3:6]

    torch.manual_seed(0)
    assert shares(Sparse(), samples) == {}


def test_masked_entries_that_are_zero_do_not_count(tmp_path: Any) -> None:
    """So nothing is to be said of them; a share is kept in a file, and older files have none."""
    torch.manual_seed(0)
    module = net(Masked(8, 12))
    found = find_scale_invariance(module, torch.randn(8, 8), forward=loss)
    save_verdict(found, tmp_path / "verdict.json")
    assert load_verdict(tmp_path / "verdict.json") == found
    with torch.no_grad():
        module[0].weight.mul_(module[0].mask)  # type: ignore[index,union-attr,operator]
    assert shares(module) == {}


def test_it_is_said_once_and_the_remedy_makes_effective_rates_right() -> None:
    """By the summary, and by one warning for all callbacks; masked once, norm and rate are those of what is kept."""

    def run(module: Any2d) -> RecordingLogger:
        summary = NormSummary()
        fit = trainer(WeightNormMonitor(), EffectiveLRMonitor(), summary, limit_train_batches=2)
        fit.fit(module, loader(batch_size=8))
        said = [s for s in summary.sentences() if "never reach the loss" in s]
        assert len(said) == module.is_told
        assert isinstance(fit.logger, RecordingLogger)
        return fit.logger

    torch.manual_seed(0)
    module = Any2d(nn.Flatten(), Masked(72, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3), lr=0.1)
    first = module.layers[1]
    start = first.weight.detach().clone()
    module.is_told = 1
    with pytest.warns(UserWarning, match=r"75% of the entries of 'layers\.1\.weight' never reach the loss") as told:
        logger = run(module)
    assert sum("never reach" in str(warning.message) for warning in told) == 1
    kept = math.sqrt((start * first.mask).double().square().sum(1).mean())
    rate = dict(logger.curves("weights/effective_lr/layers.1.weight"))[0]
    assert rate < 0.4 * 0.1 / kept**2  # what the norm counts too much
    with torch.no_grad():
        first.weight.copy_(start * first.mask)
    module.is_told = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logger = run(module)
    rate = dict(logger.curves("weights/effective_lr/layers.1.weight"))[0]
    assert rate == pytest.approx(0.1 / kept**2, rel=1e-5)
