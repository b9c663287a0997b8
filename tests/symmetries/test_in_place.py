"""The real module is asked in place: the same verdicts as on a copy, and nothing is left of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn

from lightning_normreg import EffectiveLRMonitor, NormProjection, find_scale_invariance
from lightning_normreg._symmetries import ProbeError
from lightning_normreg.callbacks import _probing
from tests.harness import Net, loader, sgd, trainer
from tests.symmetries._cases import CASES
from tests.symmetries._labels import differences
from tests.symmetries.in_place_processes import keeps

QUICK = ["qk_norm_attention_with_bias", "casts_inside", "unused_and_frozen", "sandwich_norm", "weight_standardization"]
EVERY = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK)]


@pytest.mark.parametrize("name", EVERY)
def test_verdicts_are_those_made_by_hand(name: str) -> None:
    """Every parameter gets the label that follows from the definition, keeps its bits, and has the eps share of a copy.

    The share is read at the module's own weights. Its roundoff is that of float32 with sums over these small models;
    measured, it is below 1e-5.
    """
    torch.manual_seed(0)
    case = CASES[name]()
    before = {key: t.clone() for key, t in case.module.state_dict().items()}
    verdicts = find_scale_invariance(case.module, case.batch, forward=case.loss, in_place=True)
    assert differences(verdicts, case.labels) == {}
    assert all(torch.equal(before[key], t) for key, t in case.module.state_dict().items())
    expected = find_scale_invariance(case.module, case.batch, forward=case.loss, dtype="float32")
    for key, verdict in expected.items():
        assert verdicts[key].rho_median == pytest.approx(verdict.rho_median, abs=1e-4)
        assert verdicts[key].rho_worst == pytest.approx(verdict.rho_worst, abs=1e-4)
        assert verdicts[key].standardized == verdict.standardized


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_left_of_it(raises: bool) -> None:
    """Weights, buffers, attributes, generators, gradients, and the next training step; also after an exception."""
    kept = keeps(lambda module: module, raises, in_place=True)
    assert ("must be callable in place, but it raised ValueError: in the middle" in kept["why"]) == raises
    assert kept["labels"].get("first.weight") == (None if raises else "layer")
    assert all(kept[what] for what in ("bits", "states", "gradients", "step")), kept


def body(**kind: Any) -> nn.Module:
    """Two layers with BatchNorm between them."""
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(**kind)


def test_a_step_that_keeps_state_elsewhere_is_unknown() -> None:
    """Two calls at one point differ, and nothing can be copied."""
    calls = [0]

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return module(x).exp().mean() * (1 + 0.1 * calls[0])

    verdicts = find_scale_invariance(body(), torch.randn(8, 6), forward=loss, in_place=True)
    assert verdicts["0.weight"].is_unknown
    assert "Two calls of the loss at the same weights differ" in verdicts["0.weight"].reason
    assert verdicts["3.weight"].kind == "none"


def test_what_cannot_be_asked_in_place_says_so() -> None:
    """Narrow weights, a mixture of types, and manual optimization."""
    x = torch.randn(8, 6)
    mixed = body()
    mixed[0].double()
    for module in (body(dtype=torch.bfloat16), mixed):
        with pytest.raises(ProbeError, match="must be float32, or all float64, to be asked in place, but they are"):
            find_scale_invariance(module, x, forward=lambda m, x: m(x).mean(), in_place=True)
    double = find_scale_invariance(body(dtype=torch.float64), x, forward=lambda m, x: m(x).exp().mean(), in_place=True)
    assert double["0.weight"].evidence == "float64"

    class Manual(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = body(), False

        def training_step(self, batch: Any) -> None:
            """Nothing."""

    with pytest.raises(ProbeError, match="manual optimization can only be asked on a copy"):
        find_scale_invariance(Manual(), x, in_place=True)


@pytest.mark.parametrize("limit", [100, _probing.LARGEST])
def test_large_models_are_asked_in_place_by_the_callbacks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves begin with the first logged step; without projection the weights are those of a run without callbacks."""
    monkeypatch.setattr(_probing, "LARGEST", limit)
    weights = []
    for callbacks in ([], [EffectiveLRMonitor()], [EffectiveLRMonitor(), NormProjection()]):
        torch.manual_seed(0)
        net, run = Net(sgd(momentum=0.9)), trainer(*callbacks)
        run.fit(net, loader())
        weights.append([p.detach().clone() for p in net.parameters()])
        if callbacks:
            assert run.logger.curves("weights/effective_lr/up.weight")[0][0] == 0
    assert all(torch.equal(a, b) for a, b in zip(*weights[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*weights[1:], strict=True))
