"""A reduced recipe trains the same function: two runs by hand, in float64, eps negligible."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import Symmetries, find_symmetries, reduce_decay
from tests.symmetries._small_models import (
    GPT,
    LLAMA,
    QWEN,
    VIT,
    batch_norm,
    everything,
    later_matrices,
    log_loss,
    matrices,
    trained,
    transformer,
)
from tests.symmetries._symmetry_case import vectors
from tests.symmetries._symmetry_cases import Attention, OnePlusNorm, Residual, chain, sequences

STEPS, LR, DECAY = 60, 0.01, 1.0


def pre_norm() -> tuple[nn.Module, Tensor]:
    """A residual stream with two branches."""
    return Residual(lambda: nn.LayerNorm(6, eps=1e-40)), vectors()


def attention() -> tuple[nn.Module, Tensor]:
    """One head behind a norm."""
    model = Attention()
    model.norm.eps = 1e-40
    return model, sequences()


def relu() -> tuple[nn.Module, Tensor]:
    """Nothing is normalized; products of weights are what counts."""
    return chain(nn.ReLU()), vectors()


MODELS = {
    "pre_norm": pre_norm,
    "attention": attention,
    "relu": relu,
    "batch_norm": batch_norm,
    "llama": transformer(LLAMA),
    "qwen3": transformer(QWEN),
    "gpt2": transformer(GPT),
    "vit": transformer(VIT),
}


class Case(NamedTuple):
    """A model in float64, and what was found of it."""

    model: nn.Module
    batch: Tensor
    symmetries: Symmetries
    state: dict[str, Tensor]

    def outputs(self, kind: str, *recipe: Any) -> Tensor:
        """After the steps, from the same start."""
        self.model.load_state_dict(self.state)
        trained(self.model, lambda: log_loss(self.model, self.batch), kind, *recipe, lr=LR, steps=STEPS)
        return self.model(self.batch).detach()


@functools.cache
def case_of(name: str) -> Case:
    """Asked once for all recipes and optimizers."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    symmetries = find_symmetries(model.train(), batch, forward=log_loss)
    state = {name: p.detach().clone() for name, p in model.double().state_dict().items()}
    return Case(model, batch.double() if batch.is_floating_point() else batch, symmetries, state)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lion"])
@pytest.mark.parametrize("decayed", [matrices, everything, later_matrices], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_the_reduced_recipe_trains_the_same_function(name: str, decayed: Any, kind: str) -> None:
    """Outputs agree after 60 steps to what roundoff has become; without what is left of decay they part.

    Roundoff is 1e-16 of outputs around 1 to 8; what 60 steps make of it is up to 2e-12 over five seeds.
    """
    case = case_of(name)
    rates = dict.fromkeys(decayed(case.model), LR * DECAY)
    reduced = reduce_decay(case.symmetries, rates)
    given = case.outputs(kind, rates)
    assert case.outputs(kind, reduced.rates, reduced) == pytest.approx(given, abs=1e-10)
    if kind == "adamw":
        assert any(reduced.rates.values())
        assert (case.outputs(kind, {}, reduced) - given).abs().max() > 1e-3


def labels_of(make: Any, decayed: Any) -> tuple[dict[str, str], dict[str, float]]:
    """Labels, and what is left in units of the rate given."""
    torch.manual_seed(0)
    model, batch = make()
    rate = 1e-6  # so that 1 − r and exp(−r) are the same
    reduced = reduce_decay(find_symmetries(model.train(), batch, forward=log_loss), dict.fromkeys(decayed(model), rate))
    return dict(reduced.labels), {n: round(r / rate, 3) for n, r in reduced.rates.items() if abs(r) > 1e-3 * rate}


GAINS = [f"{norm}.{what}" for norm in ("norm1", "norm2", "last") for what in ("weight", "bias")]


def test_labels_of_a_residual_stream() -> None:
    """The decay of readers is that of gain and shift in front of them; that of writers is a schedule.

    With decay on matrices alone the biases among the writers are not decayed, so they grow beside the rest. With decay
    on everything the gains' own comes on top. Biases of first layers are left with their decay: ReLU hands the factor
    of weight and bias on to the second weight, but gain and shift take that of the weight only.
    """
    labels, left = labels_of(pre_norm, matrices)
    assert left == {**dict.fromkeys(GAINS, 1.0), "out1.bias": -1.0, "out2.bias": -1.0}
    assert labels["in1.weight"] == "acts through norm1.weight, norm1.bias"
    assert labels["head.weight"] == "acts through last.weight, last.bias"
    assert labels["norm1.weight"] == "not decayed"
    labels, left = labels_of(pre_norm, everything)
    assert left == {**dict.fromkeys(GAINS, 2.0), "in1.bias": 1.0, "in2.bias": 1.0, "head.bias": 1.0}
    assert {labels[name] for name in ("embed.weight", "out1.weight", "out1.bias", "out2.weight")} == {"schedule"}
    assert {labels[name] for name in (*GAINS, "in1.bias", "head.bias")} == {"acts itself"}


def test_labels_of_the_papers_case() -> None:
    """Behind BatchNorm all is a schedule but the head's decay, which is that of the last gain and shift.

    The closing remark of the paper: only the last gain is regularized.
    """
    labels, left = labels_of(batch_norm, matrices)
    assert left == {"1.1.weight": 1.0, "1.1.bias": 1.0}
    assert labels["0.0.weight"] == labels["1.0.weight"] == "schedule"
    assert labels["2.weight"] == "acts through 1.1.weight, 1.1.bias"
    labels, left = labels_of(batch_norm, everything)
    assert left == {"1.1.weight": 2.0, "1.1.bias": 2.0, "2.bias": 1.0}
    assert labels["0.1.weight"] == labels["0.1.bias"] == "schedule"
    assert labels["2.bias"] == "acts itself"


def test_rates_out_of_range() -> None:
    """In words."""
    model, batch = relu()
    symmetries = find_symmetries(model.train(), batch, forward=log_loss)
    with pytest.raises(ValueError, match=r"`rates` must be learning rate times decay, in \[0, 1\), got 1\.5"):
        reduce_decay(symmetries, {"0.weight": 1.5})
    with pytest.raises(ValueError, match=r"`rates` must name tensors that were asked, got 'o\.weight'"):
        reduce_decay(symmetries, {"o.weight": 0.1})
    with pytest.raises(ValueError, match=r"`exponent` must be 1 or 2, got 3"):
        reduce_decay(symmetries, {"0.weight": 0.1}).lr_factors(0, 3)


def test_a_gain_with_its_1_keeps_its_decay() -> None:
    """Decay of γ is none of 1 + γ: no symmetry moves it, and none is moved to it."""
    torch.manual_seed(0)
    model, batch = Residual(lambda: OnePlusNorm(6)), vectors()
    reduced = reduce_decay(
        find_symmetries(model.train(), batch, forward=log_loss), {"norm1.weight": 0.01, "in1.weight": 0.02}
    )
    assert reduced.rates["1 + norm1.weight"] == pytest.approx(0.01)
    assert reduced.labels["1 + norm1.weight"] == "acts itself"
    assert reduced.growth["1 + norm1.weight"] == 0
    assert all(rate == 0 for name, rate in reduced.rates.items() if name.startswith("1 + ") and "norm1" not in name)
