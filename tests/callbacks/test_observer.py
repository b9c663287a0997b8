"""Models that cannot be probed: what the gradients of the first steps show instead, and what is not done with it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import EffectiveLRMonitor, NormProjection, NormSummary, WeightNormMonitor
from lightning_normreg.steps._observer import InvarianceWatchdog
from tests.harness import Net, loader, sgd, trainer

CANNOT = "could not be found out by a probe"


class Manual(Net):
    """Steps its optimizer itself, by Lightning's wrapper or by hand, and cannot be called on a copy."""

    def __init__(self, wrapped: bool = True) -> None:
        super().__init__(sgd(momentum=0.9), schedule=False)
        self.automatic_optimization, self.wrapped = False, wrapped

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step."""
        self.last_start = self.up.weight.detach().clone()
        _only_on_the_real_thing(self)
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Refuses(Net):
    """Cannot be called on a copy."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Cross entropy."""
        self.last_start = self.up.weight.detach().clone()
        _only_on_the_real_thing(self)
        return super().training_step(batch, batch_idx)


def _only_on_the_real_thing(net: Net) -> None:
    if not isinstance(net.conv1.weight, nn.Parameter):
        raise RuntimeError("only on the real thing")


def large(monkeypatch: pytest.MonkeyPatch) -> Net:
    """A model above the size that is copied, which cannot be asked in place."""
    monkeypatch.setattr("lightning_normreg.callbacks._probing.LARGEST", 100)
    return Manual()


def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Net:
    """A device whose memory is too small for a copy in either type."""

    def probe(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    monkeypatch.setattr("lightning_normreg._symmetries._probe._probe", probe)
    return Refuses(sgd())


MODELS = {
    "manual": (lambda patch: Manual(), "only on the real thing"),
    "by hand": (lambda patch: Manual(wrapped=False), "only on the real thing"),
    "refuses": (lambda patch: Refuses(sgd()), "only on the real thing"),
    "large": (large, "can only be asked on a copy"),
    "memory": (out_of_memory, "Tried to allocate"),
}


@pytest.mark.parametrize("model", MODELS)
def test_monitors_begin_when_enough_gradients_were_seen(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said why, and with which remedy; from the 34th step on the curves are those of the probed model."""
    make, why = MODELS[model]
    net = make(monkeypatch)
    run = trainer(EffectiveLRMonitor(), WeightNormMonitor(), max_epochs=7)  # 6 steps an epoch
    with pytest.warns(UserWarning, match=f"{CANNOT}: .*({why}).*invariance=, a verdict from find_scale_invariance"):
        run.fit(net, loader())
    curves = run.logger.curves("weights/effective_lr/up.weight")
    assert [step for step, _ in curves] == list(range(33, 42))
    assert len(run.logger.curves("weights/effective_lr_not_invariant/head.weight")) == 9
    rows = net.last_start.view(2, 3, 2, 9).transpose(1, 2).reshape(4, 27)  # in two groups
    assert run.callback_metrics["weights/unit_norm_max/up.weight"].item() == pytest.approx(
        rows.norm(dim=1).max().item(), 1e-6
    )


def test_too_short_a_run_says_that_nothing_was_logged() -> None:
    """Six steps are not enough."""
    run = trainer(EffectiveLRMonitor())
    with (
        pytest.warns(UserWarning, match=CANNOT),
        pytest.warns(UserWarning, match=r"logged nothing: .* 6 optimizer steps are fewer than the 33 that"),
    ):
        run.fit(Manual(), loader())
    assert "weights/effective_lr/up.weight" not in run.callback_metrics


def test_weak_evidence_never_projects(tmp_path: Any) -> None:
    """Not by itself, not with a verdict of the observer, not on resume; with names and "allow" it does."""
    unknown = r"must be known which weights are scale-invariant.*`invariance`, a verdict from find_scale_invariance"
    with pytest.warns(UserWarning, match=CANNOT), pytest.raises(ValueError, match=unknown):
        trainer(NormProjection()).fit(Manual(), loader())
    first = trainer(WeightNormMonitor(), max_epochs=7)
    with pytest.warns(UserWarning, match=CANNOT):
        first.fit(Manual(), loader())
    first.save_checkpoint(tmp_path / "observed.ckpt")
    verdict = first.callbacks[0].state_dict()["invariance"]
    assert {entry["evidence"] for entry in verdict["parameters"].values()} == {"observer"}
    with pytest.raises(ValueError, match=unknown):
        trainer(NormProjection(invariance=verdict)).fit(Manual(), loader())
    resumed = trainer(WeightNormMonitor(), NormProjection(), max_epochs=8)
    with pytest.raises(ValueError, match=unknown):
        resumed.fit(Manual(), loader(), ckpt_path=tmp_path / "observed.ckpt")
    net = Manual()
    allowed = NormProjection(include=["conv1.weight"], on_not_invariant="allow", invariance=verdict)
    with pytest.warns(UserWarning, match="Running statistics could not follow the first projection"):
        trainer(allowed).fit(net, loader())
    assert net.conv1.weight.detach().flatten(1).norm(dim=1) == pytest.approx(torch.ones(6), rel=1e-6)


def test_a_summary_does_not_wait(capsys: pytest.CaptureFixture[str]) -> None:
    """It comes before the first step, and says that nothing is known yet."""
    summary = NormSummary()
    with pytest.warns(UserWarning, match=CANNOT):
        trainer(summary).fit(Manual(), loader())
    assert "is not known" in summary.sentences()[0]
    assert "is not known" in capsys.readouterr().out


class FreezesLate(Net):
    """Puts its first BatchNorm into evaluation mode in the middle of the run."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Cross entropy."""
        if self.trainer.global_step >= 100:
            self.norm1.eval()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [Net, FreezesLate])
def test_a_watchdog_is_there_for_all_callbacks(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns of the frozen layer and of that one only, once; a healthy run is quiet."""
    monkeypatch.setattr(InvarianceWatchdog, "EVERY", 50)
    net = make(sgd(), schedule=False)
    run = trainer(EffectiveLRMonitor(), WeightNormMonitor(), max_epochs=40)
    if make is Net:
        run.fit(net, loader())  # warnings are errors
        return
    with pytest.warns(UserWarning, match=r"No longer scale-invariant: 'conv1\.weight' \(T = [\d.]+\)\. ") as caught:
        run.fit(net, loader())
    assert ["No longer" in str(w.message) for w in caught].count(True) == 1


@pytest.mark.parametrize("on_lost", ["stop", "keep", "raise"])
def test_what_is_lost_is_let_go(on_lost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its curve goes to another name, and the projection stops, goes on, or ends the run; the other weight is held."""
    monkeypatch.setattr(InvarianceWatchdog, "EVERY", 50)
    net = FreezesLate(sgd(), schedule=False)
    monitor, run = EffectiveLRMonitor(), trainer(max_epochs=30)
    run.callbacks += [monitor, NormProjection(on_lost=on_lost)]  # type: ignore[attr-defined]
    if on_lost == "raise":
        error = pytest.raises(RuntimeError, match=r"`on_lost='raise'`: conv1\.weight can no longer be held")
        with pytest.warns(UserWarning, match="No longer scale-invariant"), error:
            run.fit(net, loader())
        return
    said: Any = pytest.warns(UserWarning, match="holds conv1.weight no more") if on_lost == "stop" else nullcontext()
    with pytest.warns(UserWarning, match="No longer scale-invariant"), said:
        run.fit(net, loader())
    norms = net.conv1.weight.detach().flatten(1).norm(dim=1)
    assert bool(((norms - 1).abs() < 1e-5).all()) is (on_lost == "keep")
    up = net.up.weight.detach().view(2, 3, 2, 9).transpose(1, 2).flatten(0, 1).flatten(1).norm(dim=1)
    assert up == pytest.approx(torch.ones(4), rel=1e-6)
    history = monitor.history().set_index("step")
    found = history["weights/effective_lr/conv1.weight"].dropna()
    lost = history["weights/effective_lr_not_invariant/conv1.weight"].dropna()
    assert len(found) + len(lost) == len(history)
    assert found.index.max() + 1 == lost.index.min()
    assert 100 <= lost.index.min() <= 155  # frozen after 100 steps; looks are four steps from 100 and from 150 on


def test_observing_changes_nothing() -> None:
    """Weights are those of a run without callbacks, bit for bit."""
    ends: list[dict[str, Tensor]] = []
    for callbacks in ([], [EffectiveLRMonitor(), WeightNormMonitor()]):
        torch.manual_seed(0)
        net = Manual()
        run = trainer(*callbacks, max_epochs=7)
        if callbacks:
            with pytest.warns(UserWarning, match=CANNOT):
                run.fit(net, loader())
        else:
            run.fit(net, loader())
        ends.append(net.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
