"""A verdict survives the disk, and a wrong file is told so."""

from __future__ import annotations

import json

import pytest

from lightning_normreg._symmetries import load_verdict, save_verdict, verdict_to_dict
from lightning_normreg._weights import ScaleInvariance

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
