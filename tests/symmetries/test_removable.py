"""Penalties that are removable in the limit: by hand, and of models of ``transformers`` as they are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg import ReducedDecay, find_symmetries, reduce_decay
from tests.symmetries._small_models import batch_norm, everything, log_loss, matrices
from tests.symmetries._symmetry_case import vectors
from tests.symmetries._symmetry_cases import OnePlusNorm, Residual


def reduced(model: nn.Module, batch: Any, decayed: Any, loss: Any = log_loss) -> ReducedDecay:
    """With decay on these."""
    return reduce_decay(find_symmetries(model.train(), batch, forward=loss), dict.fromkeys(decayed(model), 1e-4))


def test_a_residual_stream() -> None:
    """Writers shrink together. So does what comes before them in a branch: gain, shift, first layer and its bias.

    They hand their factor on to the second layer, which is a writer and may shrink faster. The head has the last gain
    and shift in front of it, which may grow, unless they are decayed as well: then both are in the way of each other.
    """
    torch.manual_seed(0)
    model = Residual(lambda: nn.LayerNorm(6))
    assert reduced(model, vectors(), matrices).removable == {*matrices(model)}
    kept = {"last.weight", "last.bias", "head.weight", "head.bias"}
    assert reduced(model, vectors(), everything).removable == {*everything(model)} - kept


def test_the_papers_case() -> None:
    """Only the last gain and shift, with the head, cannot shrink: if they are decayed, both."""
    torch.manual_seed(0)
    model, batch = batch_norm()
    assert reduced(model, batch, matrices).removable == {"0.0.weight", "1.0.weight", "2.weight"}
    assert reduced(model, batch, everything).removable == {"0.0.weight", "1.0.weight", "0.1.weight", "0.1.bias"}


def test_decay_of_a_gain_with_its_1() -> None:
    """It draws 1 + γ to 1 and not to 0: it is none of those, and what is decayed beside it cannot be traded for it.

    The first layers still hand their factor on to the second ones, which are writers. Nothing follows the head.
    """
    torch.manual_seed(0)
    model = Residual(lambda: OnePlusNorm(6))
    assert reduced(model, vectors(), matrices).removable == {*matrices(model)}
    kept = {"norm1.weight", "norm2.weight", "last.weight", "head.weight", "head.bias"}
    assert reduced(model, vectors(), everything).removable == {*everything(model)} - kept


REMOVABLE = {
    # Of all decayed tensors: with decay on matrices only (a class token counts as one), and with decay on everything.
    "gpt2": ((14, 14), (0, 34)),
    "llama": ((16, 16), (9, 21)),
    "tied llama": ((15, 15), (0, 20)),
    "qwen3": ((16, 16), (15, 25)),
    "vit": ((16, 16), (16, 38)),
    "t5": ((33, 35), (0, 47)),
    "gemma2": ((15, 15), (8, 24)),
    "olmo2": ((13, 16), (12, 25)),
    "bert": ((8, 16), (0, 40)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize("name", REMOVABLE)
def test_models_of_transformers(name: str) -> None:
    """As many as by the null space of a separate program (numbers of two layers, width 16)."""
    cases = pytest.importorskip("tests.symmetries._transformers_cases")
    torch.manual_seed(0)
    if name == "tied llama":
        model = cases.hf.LlamaForCausalLM(cases.hf.LlamaConfig(**cases.DECODER, tie_word_embeddings=True))
        batch = cases.words()
    else:
        model, batch, _ = cases.PRETRAINED[name]()
    symmetries = find_symmetries(model.train(), batch, forward=cases.own_loss)
    for expected, least in zip(REMOVABLE[name], (2, 0), strict=True):
        rates = {n: 1e-4 for n, p in model.named_parameters() if p.ndim >= least}
        found = reduce_decay(symmetries, rates)
        decayed = {n for n, label in found.labels.items() if label != "not decayed"}
        assert found.removable <= decayed
        assert (len(found.removable), len(decayed)) == expected
