"""The probe on models of ``transformers``, of random weights: nothing is downloaded."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from lightning_normreg._symmetries import find_scale_invariance
from lightning_normreg._weights import summarize
from tests.symmetries._labels import differences

pytest.importorskip("transformers", reason="transformers is not installed, and its models are only tested where it is")
from tests.symmetries._transformers_cases import PRETRAINED, own_loss


def expand(labels: dict[str, str], names: list[str]) -> dict[str, str]:
    """Label of each name that a glob matches; every glob must match."""
    assert all(any(fnmatchcase(name, glob) for name in names) for glob in labels)
    return {name: label for name in names for glob, label in labels.items() if fnmatchcase(name, glob)}


# A kernel that refuses float64 is answered by float32, with a warning; which ones do depends on the version of torch.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Scale invariance was probed in float32")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", PRETRAINED)
def test_verdicts_on_real_models(name, dtype):
    """Every parameter of every model gets the label that follows from its architecture, in either type."""
    torch.manual_seed(0)
    model, batch, labels = PRETRAINED[name]()
    verdicts = find_scale_invariance(model.train(), batch, forward=own_loss, dtype=dtype)
    assert differences(verdicts, expand(labels, list(verdicts))) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_verdicts_in_place(name):
    """The same labels from the module itself, whose weights keep their bits."""
    torch.manual_seed(0)
    model, batch, labels = PRETRAINED[name]()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    verdicts = find_scale_invariance(model.train(), batch, forward=own_loss, in_place=True)
    assert differences(verdicts, expand(labels, list(verdicts))) == {}
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "llama", "t5"])
def test_classic_transformers_have_no_invariant_weight(name):
    """Post-LN and pre-LN transformers have none, and the summary says so."""
    torch.manual_seed(1)
    model, batch, _ = PRETRAINED[name]()
    verdicts = find_scale_invariance(model.train(), batch, forward=own_loss, seed=1)
    assert not any(v.is_invariant for v in verdicts.values())
    assert "No parameter is scale-invariant by itself" in summarize(verdicts)
