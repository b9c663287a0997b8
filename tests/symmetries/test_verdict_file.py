"""A verdict survives the disk, and a wrong file is told so."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lightning_normreg._symmetries import find_scale_invariance, load_verdict, save_verdict, verdict_to_dict
from lightning_normreg._weights import ScaleInvariance, named_roles, watch

VERDICT = {
    "conv.weight": ScaleInvariance("neuron", dim=0, block_size=1, z=1e-15, rho_median=1e-5, rho_worst=2e-5, reason="ü"),
    "qkv.weight": ScaleInvariance(
        "block", dim=0, block_size=4, slices=((0, 8), (12, 16)), needs_bias="qkv.bias", z=1e-9
    ),
    "qkv.bias": ScaleInvariance("none"),
    "head.weight": ScaleInvariance("none", z=0.7, evidence="float32"),
    "frozen.weight": ScaleInvariance("unknown", reason="It is frozen."),
}


def test_a_verdict_survives_the_disk(tmp_path):
    """What is saved is what is loaded, from the file or from its content."""
    save_verdict(VERDICT, tmp_path / "verdict.json")
    assert load_verdict(tmp_path / "verdict.json") == VERDICT
    assert load_verdict(str(tmp_path / "verdict.json")) == VERDICT
    assert load_verdict(json.loads((tmp_path / "verdict.json").read_text())) == VERDICT
    assert load_verdict(VERDICT) == VERDICT


def test_a_file_of_before_there_was_unknown_is_read():
    """What is written there is what is taken: frozen parameters were "none"."""
    content = verdict_to_dict({"a": ScaleInvariance("none", reason="It is frozen (requires_grad=False).")})
    (loaded,) = load_verdict(json.loads(json.dumps(content))).values()
    assert (loaded.kind, loaded.is_invariant, loaded.is_unknown) == ("none", False, False)
    assert not ScaleInvariance("unknown").is_invariant
    assert ScaleInvariance("unknown").is_unknown


def changed(**changes):
    """The saved form with one entry changed."""
    content = verdict_to_dict(VERDICT)
    content["parameters"]["conv.weight"].update(changes)
    return content


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "must say 'format'.* but the mapping does not"),
        ({**verdict_to_dict(VERDICT), "version": 2}, "must be of version 1, but the mapping is of 2"),
        (changed(colour="red"), r"'conv.weight' in the mapping must have the fields .* \['colour'\] are unknown"),
        (changed(kind="row"), "kind of 'conv.weight' in the mapping must be one of neuron, .* got 'row'"),
        (changed(evidence="hope"), "evidence of 'conv.weight' .* must be one of .* got 'hope'"),
        (changed(slices=[[4, 2]]), r"slices of 'conv.weight' .* must be pairs .* got \[\[4, 2\]\]"),
        (changed(slices=[[0, 4], [2, 6]]), "slices of 'conv.weight' .* that do not overlap"),
        (changed(slices=[[0, 1.5]]), "slices of 'conv.weight' .* of integers"),
        (changed(slices=3), "slices of 'conv.weight'"),
        (changed(dim=-1), "dim of 'conv.weight' .* must be a dimension or null, got -1"),
        (changed(groups=0), "groups of 'conv.weight' .* at least 1, got 0"),
        (changed(block_size=True), "block_size of 'conv.weight' .* got True"),
        (changed(needs_bias="conv.weight"), "needs_bias of 'conv.weight' .* must be another parameter of it"),
        (changed(needs_bias="conv.bias"), "needs_bias of 'conv.weight' .* got 'conv.bias'"),
        (changed(rho_median=1.5), r"rho_median of 'conv.weight' .* a share from 0 to 1, or null, got 1\.5"),
        (changed(z=float("nan")), "z of 'conv.weight' .* got nan"),
    ],
)
def test_what_is_no_verdict_is_named(content, message):
    """Unknown formats, versions, fields and values are errors."""
    with pytest.raises(ValueError, match=message):
        load_verdict(content)


@pytest.mark.parametrize("text, message", [("{", "must be JSON"), ("[]", "must be a JSON object, but .* holds a list")])
def test_a_file_that_is_no_verdict_is_named(tmp_path, text, message):
    """The path is in the error."""
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_verdict(tmp_path / "wrong.json")


def test_a_missing_file_is_missing(tmp_path):
    """Nothing hides that there is no such file."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_verdict(tmp_path / "nowhere.json")


class Attention(nn.Module):
    """Attention whose first two thirds of qkv are blocks of as many rows as a head is wide."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, size = heads, heads * width
        self.qkv, self.out = nn.Linear(8, 3 * size, bias=False), nn.Linear(size, 3)
        self.up, self.norm = nn.Linear(3, size, bias=False), nn.BatchNorm1d(5)

    def forward(self, x):
        """Logits."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (nn.functional.normalize(t, dim=-1) for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.up(self.norm(self.out(y)))


def asked(module):
    """The verdict on the samples of this file."""
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    return find_scale_invariance(module, x, forward=lambda m, x: m(x).exp().mean())


def test_a_verdict_on_a_twin_fits_the_model(tmp_path):
    """With as many heads, of another width: what is selected is what the model's own verdict selects."""
    torch.manual_seed(0)
    twin, model = Attention(2, 3), Attention(2, 8)
    save_verdict(asked(twin), tmp_path / "twin.json")
    found, own = (
        {w.name: (w.parts, w.invariant) for w in watch(named_roles(model), None, [], verdict=verdict)}
        for verdict in (load_verdict(tmp_path / "twin.json"), asked(model))
    )
    assert found == own
    assert found["qkv.weight"][0][0].unit == 8


def test_a_verdict_that_does_not_fit_is_an_error():
    """Three slices of another tensor are no number of blocks of this one; a file that does not say sizes is taken."""
    named = named_roles(nn.Linear(2, 10))
    for wrong in (
        ScaleInvariance("block", dim=0, block_size=2, of=6),
        ScaleInvariance("neuron", dim=0, block_size=1, slices=((0, 1),), of=3),
        ScaleInvariance("block", dim=0, block_size=4, slices=((0, 12),)),
        ScaleInvariance("dim", dim=2, block_size=1, of=3),
    ):
        with pytest.raises(ValueError, match=r"must fit the model, but the units of 'weight' .* Probe a twin"):
            watch(named, None, [], verdict={"weight": wrong})
    (old,) = watch(named, None, [], verdict={"weight": ScaleInvariance("block", dim=0, block_size=5)})
    assert old.units() == 2
