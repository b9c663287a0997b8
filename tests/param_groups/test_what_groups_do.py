"""What decay_groups says that its grouping does to the function, on models whose symmetries were reasoned by hand."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg import DecayGroupsMixin, Symmetries, cli, decay_groups, find_symmetries
from lightning_normreg.demos import DemoConvNet
from tests.symmetries._symmetry_case import log_loss
from tests.symmetries._symmetry_cases import Residual


def symmetries_of(module: nn.Module) -> Symmetries:
    """Of a model of five features."""
    return find_symmetries(module.train(), torch.randn(8, 5), forward=log_loss, progress=False)


def stream() -> nn.Module:
    """Its writers, embed.weight, out1, out2 with their biases, are the one set."""
    torch.manual_seed(0)
    return Residual(lambda: nn.LayerNorm(6))


def chain() -> nn.Module:
    """Units 0.weight and 3.weight, the set {1.weight, 1.bias}, and (4.weight, 4.bias) against 6.weight."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def remedy(warned: pytest.WarningsRecorder) -> dict[str, float]:
    """The overrides in the only warning, as a user would paste them."""
    (warning,) = warned.list
    pasted: dict[str, float] = ast.literal_eval(str(warning.message).partition("overrides=")[2].removesuffix("."))
    return pasted


def test_a_chain_keeps_the_decay_of_its_head(caplog: pytest.LogCaptureFixture) -> None:
    """Weights in front of BatchNorm are units; the head's decay is that of the last gain and shift, at its rate."""
    model = chain()
    with caplog.at_level("INFO"):
        decay_groups(model, 0.1, symmetries=symmetries_of(model))
    assert (
        "Decay of 0.1 on 3 tensors trains this network like decay of 0.1 on 2 tensors (4.weight, 4.bias)" in caplog.text
    )


def test_units_alone_are_a_schedule(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left without the head; the mapping of a file is taken as well, and by the mixin."""

    class Model(DecayGroupsMixin, nn.Sequential):
        pass

    model = Model(*chain())
    found = symmetries_of(model).to_dict()
    with caplog.at_level("INFO"):
        groups = model.decay_groups(0.1, overrides={"6.weight": 0.0}, symmetries=found)
    assert "Decay of 0.1 on 2 tensors is a learning-rate schedule on this network and nothing else" in caplog.text
    silent = decay_groups(model, 0.1, overrides={"6.weight": 0.0})
    assert [g["param_names"] for g in groups] == [g["param_names"] for g in silent]  # only said, never decided


@pytest.mark.parametrize(
    "make, arguments, expected",
    [
        (stream, {}, {"out*.bias": 0.1}),  # biases of in1, in2 and head are in no set, and stay
        (stream, {"bias": 0.02}, {"out*.bias": 0.1}),
        (stream, {"bias": None, "overrides": {"out1.bias": 0.0}}, {"out1.bias": 0.1}),  # out2.bias is as it should be
        (chain, {"gamma": 0.1}, {"1.bias": 0.1}),  # and not 4.bias, which a glob of all would take
    ],
)
def test_the_remedy_can_be_pasted(make: Any, arguments: dict[str, Any], expected: dict[str, float]) -> None:
    """With it no warning is left (warnings are errors), and nothing but the set is decayed otherwise."""
    model = make()
    found = symmetries_of(model)
    with pytest.warns(UserWarning, match=r"scale-invariant together.*overrides=") as warned:
        before = decay_groups(model, 0.1, **arguments, symmetries=found)
    assert remedy(warned) == expected
    merged = {**arguments, "overrides": {**arguments.get("overrides", {}), **expected}}
    after = decay_groups(model, 0.1, **merged, symmetries=found)
    decays = [{n: g["weight_decay"] for g in groups for n in g["param_names"]} for groups in (before, after)]
    (joint,) = (s for s in found.basis if s.kind == "set")
    assert {decays[1][name] for name in joint.exponents} == {0.1}
    assert {name for name in decays[0] if decays[0][name] != decays[1][name]} <= set(joint.exponents)


def test_a_frozen_member_leaves_only_no_decay() -> None:
    """What is frozen cannot be decayed, so the rest of its set should not be."""
    model = stream()
    found = symmetries_of(model)
    model.get_parameter("embed.weight").requires_grad_(False)
    with pytest.warns(UserWarning, match=r"embed\.weight.*overrides=") as warned:
        decay_groups(model, 0.1, symmetries=found)
    assert remedy(warned) == {"out*.weight": 0.0}
    decay_groups(model, 0.1, overrides=remedy(warned), symmetries=found)


def test_what_is_refused(tmp_path: Path) -> None:
    """Symmetries of another model, a file of something else, and no file."""
    with pytest.raises(ValueError, match=r"`symmetries` must be those of this model, but it has no 0\.bias.*save"):
        decay_groups(stream(), 0.1, symmetries=symmetries_of(chain()))
    (tmp_path / "other.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match=r"must be as Symmetries\.save writes them, but '.*other\.json' is not"):
        decay_groups(chain(), 0.1, symmetries=str(tmp_path / "other.json"))
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        decay_groups(chain(), 0.1, symmetries=str(tmp_path / "none.json"))


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``--decay.symmetries FILE``."""
    monkeypatch.chdir(tmp_path)
    batch = (torch.randn(8, 1, 8, 8), torch.arange(8))
    find_symmetries(DemoConvNet().train(), batch, progress=False).save("found.json")
    words = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    decay = ["--optimizer=AdamW", "--optimizer.weight_decay=0.05", "--decay.symmetries=found.json"]
    with caplog.at_level("INFO"):
        cli.main(["fit", "--model=DemoConvNet", "--data=DigitsDataModule", "--seed_everything=0", *words, *decay])
    assert "like decay of 0.05 on 2 tensors (block4.norm.weight, block4.norm.bias)" in caplog.text
