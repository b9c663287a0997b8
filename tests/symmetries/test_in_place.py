"""The real module is asked in place: the same verdicts as on a copy, and nothing is left of it."""

from __future__ import annotations

import pytest
import torch

from lightning_normreg import find_scale_invariance
from tests.symmetries._cases import CASES
from tests.symmetries._labels import differences

QUICK = ["qk_norm_attention_with_bias", "casts_inside", "unused_and_frozen", "sandwich_norm", "l2_inside_the_loss"]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK)]
)
def test_verdicts_are_those_made_by_hand(name):
    """In float32 every parameter gets the label that follows from the definition, and keeps its bits."""
    torch.manual_seed(0)
    case = CASES[name]()
    before = {key: t.clone() for key, t in case.module.state_dict().items()}
    verdicts = find_scale_invariance(case.module, case.batch, forward=case.loss, in_place=True)
    assert differences(verdicts, case.labels) == {}
    assert all(torch.equal(before[key], t) for key, t in case.module.state_dict().items())
