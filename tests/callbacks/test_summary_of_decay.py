"""NormSummary on what decay does: asked in a run, given, kept in checkpoints, and without a trace in training."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import NormSummary, Symmetries, decay_groups, find_symmetries
from lightning_normreg.cli import main
from tests.symmetries._symmetry_case import log_loss
from tests.symmetries._symmetry_cases import Residual

WRITERS = {"net.embed.weight", "net.out1.weight", "net.out2.weight"}
READERS = {"net.in1.weight": "norm1", "net.in2.weight": "norm2", "net.head.weight": "last"}


class Stream(LightningModule):
    """A pre-norm residual stream whose matrices are decayed, with dropout in front."""

    def __init__(self, optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.drop, self.optimizer = Residual(lambda: nn.LayerNorm(6)), nn.Dropout(0.1), optimizer
        self.calls = 0

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross entropy."""
        self.calls += 1
        return log_loss(nn.Sequential(self.drop, self.net), batch[0])

    def configure_optimizers(self) -> Any:
        """Decay of 0.1 on matrices."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return self.optimizer(groups, lr=0.01)


def fitted(summary: NormSummary, module: LightningModule, **fit: Any) -> tuple[Trainer, NormSummary]:
    """Two steps."""
    torch.manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(8, 5)), batch_size=4)
    trainer = Trainer(
        max_epochs=fit.pop("epochs", 1), callbacks=[summary], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, **fit)
    return trainer, summary


def test_labels_of_a_residual_stream() -> None:
    """Decay of readers is that of the gain and shift in front; of writers a schedule, as they are a set.

    Biases among the writers are not decayed, which makes the set's decay unequal, and is said.
    """
    _, summary = fitted(NormSummary(), Stream())
    rows = {row["parameter"]: row for row in summary.rows()}
    assert {rows[name]["acts"] for name in WRITERS} == {"acts through net.out1.bias, net.out2.bias"}
    for name, norm in READERS.items():
        assert rows[name]["acts"] == f"acts through net.{norm}.weight, net.{norm}.bias"
        assert rows[name]["removable"] is True
    assert rows["net.norm1.weight"]["acts"] == "not decayed"
    said = " ".join(summary.sentences())
    assert "Decay of 0.1 on 6 tensors trains this network like decay of 0.1 on 6 tensors" in said
    assert "With these gains decayed by 0.1 as well it would be 2 times as much." in said
    assert "net.out1.bias, net.out2.bias of them are decayed less or not at all" in said


def test_adam_decays_through_its_gradient() -> None:
    """Then nothing is claimed."""
    _, summary = fitted(NormSummary(), Stream(torch.optim.Adam))
    assert {row["acts"] for row in summary.rows()} == {""}
    assert "What decay does through the gradient of Adam is not known here." in summary.sentences()


def test_training_is_not_touched() -> None:
    """Weights after training are those of a run that does not ask, bit for bit, dropout included."""
    asked, silent = Stream(), Stream()
    fitted(NormSummary(), asked)
    fitted(NormSummary(symmetries=None), silent)
    assert asked.calls == silent.calls
    for a, b in zip(asked.parameters(), silent.parameters(), strict=True):
        assert torch.equal(a, b)


def test_given_in_a_file_or_not_asked(tmp_path: Path) -> None:
    """The same answer; None leaves the column out."""
    module = Stream()
    found = find_symmetries(module.train(), [torch.randn(4, 5)])
    found.save(tmp_path / "found.json")
    assert Symmetries.load(tmp_path / "found.json") == found
    _, given = fitted(NormSummary(symmetries=str(tmp_path / "found.json")), Stream())
    _, asked = fitted(NormSummary(), Stream())
    assert [row["acts"] for row in given.rows()] == [row["acts"] for row in asked.rows()]
    _, silent = fitted(NormSummary(symmetries=None), Stream())
    assert {row["acts"] for row in silent.rows()} == {""}


def test_bad_symmetries(tmp_path: Path) -> None:
    """In words, before the first step."""
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be as Symmetries.save writes them, but '.*empty.json' is not"):
        NormSummary(symmetries=str(tmp_path / "empty.json"))
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        NormSummary(symmetries=str(tmp_path / "none.json"))
    other = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).train()
    found = find_symmetries(other, torch.randn(4, 5), forward=log_loss)
    with pytest.raises(ValueError, match=r"`symmetries` must be those of this model, but it has no 0\.bias, 0\.weight"):
        fitted(NormSummary(symmetries=found), Stream())
    broken = found.to_dict() | {"basis": [{"kind": "pair", "exponents": {"nowhere": 1}}]}
    with pytest.raises(ValueError, match=r"the mapping is not .*nowhere"):
        Symmetries.load(broken)


def test_a_resumed_run_does_not_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is in the checkpoint."""
    trainer, first = fitted(NormSummary(), Stream())
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("lightning_normreg.callbacks._probing.find_symmetries", asked)
    _, second = fitted(NormSummary(), Stream(), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert [row["acts"] for row in second.rows()] == [row["acts"] for row in first.rows()]
    assert "could not be found out" not in " ".join(second.sentences())


def test_too_many_passes_are_not_taken() -> None:
    """Of a model without layers of one kind: it is said how to get the answer."""
    module = Stream()
    for number in range(60):
        setattr(module.net, f"extra_{number}", nn.Linear(1 + number, 1))
    _, summary = fitted(NormSummary(), module)
    assert {row["acts"] for row in summary.rows()} == {""}
    assert "NormSummary(symmetries=path)" in summary.sentences()[-1]


def test_what_decay_groups_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same of a grouping; of biases in the set that are not decayed there is a warning, whose remedy helps."""
    module = Stream()
    find_symmetries(module.train(), [torch.randn(4, 5)]).save(tmp_path / "found.json")
    with (
        caplog.at_level("INFO"),
        pytest.warns(UserWarning, match=r"net\.out1\.bias, net\.out2\.bias of them .* overrid"),
    ):
        decay_groups(module, 0.1, symmetries=str(tmp_path / "found.json"))
    assert "like decay of 0.1 on 6 tensors" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):  # and no warning
        decay_groups(module, 0.1, overrides={"net.out?.bias": None}, symmetries=str(tmp_path / "found.json"))
    assert "like decay of 0.1 on 6 tensors (net.norm1.weight, net.norm1.bias" in caplog.text
    assert "-0.1" not in caplog.text
    with pytest.raises(ValueError, match="`symmetries` must be those of this model, but it has no net"):
        decay_groups(nn.Linear(2, 2), 0.1, symmetries=str(tmp_path / "found.json"))


def test_inspect_says_it_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the symmetries in it, or those of a file; with none nothing is said."""
    trainer, summary = fitted(NormSummary(), Stream())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    silent, _ = fitted(NormSummary(symmetries=None), Stream())
    silent.save_checkpoint(tmp_path / "silent.ckpt")
    find_symmetries(Stream().train(), [torch.randn(4, 5)]).save(tmp_path / "found.json")
    expected = {row["parameter"]: row["acts"] for row in summary.rows()}
    capsys.readouterr()
    for words in (["last.ckpt"], ["silent.ckpt", "--symmetries", str(tmp_path / "found.json")]):
        main(["inspect", str(tmp_path / words[0]), *words[1:], "--optimizer", "AdamW", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert {row["parameter"]: row["acts"] for row in told["parameters"]} == expected
        assert any("like decay of 0.1 on 6 tensors" in note for note in told["notes"])
    main(["inspect", str(tmp_path / "silent.ckpt"), "--optimizer", "AdamW", "--json"])
    assert {row["acts"] for row in json.loads(capsys.readouterr().out)["parameters"]} == {None}
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "silent.ckpt"), "--symmetries", str(tmp_path / "none.json")])
    assert "symmetries" in capsys.readouterr().err


def test_another_model_is_asked_anew() -> None:
    """A callback that is used again does not speak of the model before."""
    summary = NormSummary()
    fitted(summary, Stream())
    other = Stream()
    other.net.last = nn.Identity()  # a stream that is not normalized at its end is read by the head, which undoes it
    _, summary = fitted(summary, other)
    rows = {row["parameter"]: row["acts"] for row in summary.rows()}
    assert "schedule" not in rows.values()
    assert rows["net.in1.weight"] == "acts through net.norm1.weight, net.norm1.bias"
    assert "net.head.weight" in rows["net.embed.weight"]


def test_what_was_frozen_when_asked_is_named(tmp_path: Path) -> None:
    """Symmetries without a tensor say nothing of its decay, and that is said."""
    frozen = Stream()
    frozen.net.head.weight.requires_grad_(requires_grad=False)
    find_symmetries(frozen.train(), [torch.randn(4, 5)]).save(tmp_path / "found.json")
    _, summary = fitted(NormSummary(symmetries=str(tmp_path / "found.json")), Stream())
    assert "Of net.head.weight it is not known: the symmetries were asked without." in summary.sentences()
    assert {row["parameter"]: row["acts"] for row in summary.rows()}["net.head.weight"] == ""


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_does_not_change_the_unit(nesterov: bool) -> None:
    """Momentum sums the decay up as it does the gradients; it is written in the unit that was given."""
    _, summary = fitted(NormSummary(), Stream(partial(torch.optim.SGD, momentum=0.9, nesterov=nesterov)))
    said = " ".join(summary.sentences())
    assert "Decay of 0.1 on 6 tensors trains this network like decay of 0.1 on 6" in said
    assert "momentum spreads it over further steps" in said


def test_a_warm_up_from_zero_changes_nothing() -> None:
    """Before the first step every learning rate is 0; labels are those of the schedule that follows."""

    class Warm(Stream):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    _, warm = fitted(NormSummary(), Warm())
    _, plain = fitted(NormSummary(), Stream())
    assert [row["lr"] for row in warm.rows()] == [0.0] * len(warm.rows())
    assert [row["acts"] for row in warm.rows()] == [row["acts"] for row in plain.rows()]
    assert warm.sentences()[1] == plain.sentences()[1]
    assert "momentum" not in " ".join(plain.sentences())
