"""Muon on sets, and sets that are spread over two optimizers, as it takes matrices alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_normreg import NormProjection
from lightning_normreg.steps import Projector, watch
from tests.callbacks.sets import fitted, flat, writers
from tests.callbacks.test_sets_controlled import KINDS, logits, made, muon, symmetries, turned
from tests.symmetries._small_models import LLAMA

pytestmark = pytest.mark.filterwarnings("ignore:The Trainer has no logger")


@pytest.mark.slow
def test_muon_in_bfloat16() -> None:
    """As it is: to 1e-9 for powers of two. Its rounding, to 2^-9, does not commute with other factors.

    Of what 8 steps move the logits by, that is at most 0.9 % for four seeds and both models without biases.
    """
    plain = logits(turned(LLAMA, muon))
    moved = float((plain - logits(made(LLAMA, muon))).abs().max())
    for scale, bound in ((2**-10, 1e-9), (2**10, 1e-9), (1e-3, 0.03 * moved), (1e3, 0.03 * moved)):
        assert float((logits(turned(LLAMA, muon, scale=scale)) - plain).abs().max()) < bound


@pytest.mark.parametrize("name", ["GPT-2", pytest.param("ViT", marks=pytest.mark.slow)])
def test_a_set_in_two_optimizers(name: str) -> None:
    """Held at its norm from the start, state of both follows; one angle of two steps there is not, which is said."""
    kind = KINDS[name]
    model = made(kind, muon)
    fitted(model, NormProjection(7.0, unit="set", symmetries=symmetries(kind)))
    assert len(model.steps) == 4
    for step in model.steps:
        assert [float(flat(w, writers(kind, 1)).norm()) for w in step] == pytest.approx([7.0] * 2)
    optimizers = [optimizer.optimizer for optimizer in model.optimizers()]
    mine = [model.get_parameter(name) for name in writers(kind, 1)]

    def averages() -> list[Tensor]:
        states = [next(o.state[p] for o in optimizers if p in o.state) for p in mine]
        return [state.get("exp_avg", state.get("momentum_buffer")).clone() for state in states]

    before = averages()
    targets = watch(model, symmetries=symmetries(kind), unit="set")
    Projector(targets, 14.0).start(targets, optimizers)
    for old, new in zip(before, averages(), strict=True):
        torch.testing.assert_close(new, old / 2, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"all of 'residual_stream', but .* unequal optimizer\. Put them"):
        turned(kind, muon)
