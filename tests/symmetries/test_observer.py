"""The observer of gradients against the labels by hand: no false yes but one, and known reasons for what it misses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg import ScaleInvariance
from lightning_normreg._symmetries._thresholds import NARROW_OBSERVER, WIDE_OBSERVER, ObserverThresholds
from lightning_normreg._weights._roles import named_roles
from lightning_normreg.steps import StepDispatcher, StepSubscriber
from lightning_normreg.steps._observer import GradientObserver, InvarianceWatchdog
from tests.symmetries._case import Case, head
from tests.symmetries._cases import CASES
from tests.symmetries._labels import label

# Small activations never reach the clamp at 6, so that in training this weight is scale-invariant.
UNVISITED_CLAMP = {("relu6_before_layernorm", "0.weight")}
# The weight has a live bias beside it that does not belong to the unit: the observer cannot rule an accident out.
# Behind padding the gradient of a row is masked, which the probe's generic points can tell from a weight's own.
BESIDE_A_BIAS = {"weight_norm", "weight_standardization", "spectral_norm", "embedding_with_padding"}
# Larger units than the smallest are still units: it does not look along third dimensions, and under bfloat16 noise a
# bias beside weight standardization is taken along.
COARSER = {("normalized_third_dimension", "maps"), ("weight_standardization", "0.weight")}


def told_of(optimizer: torch.optim.Optimizer, watch: StepSubscriber) -> StepDispatcher:
    """A dispatcher that tells of an optimizer's steps."""
    dispatcher = StepDispatcher()
    dispatcher.subscribe(watch)
    dispatcher.attach([optimizer])
    return dispatcher


def observed(case: Case, make: Any, limits: ObserverThresholds, *, narrow: bool) -> dict[str, Any]:
    """Verdict after a few AdamW steps on changing batches."""
    trained = [p for p in case.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    observer = GradientObserver(named_roles(case.module), limits)
    dispatcher = told_of(optimizer, observer)
    while not observer.done:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = case.loss(case.module, make().batch)
        loss.backward()
        dispatcher.gradients_ready(0, optimizer)
        optimizer.step()
    return observer.verdict()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch, of RMSNorm under autocast
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_observed_labels(name: str, narrow: bool) -> None:
    """Whatever it calls scale-invariant is so, in the right units; it misses parts of tensors, and says "none"."""
    torch.manual_seed(0)
    case = CASES[name]()
    verdicts = observed(case, CASES[name], NARROW_OBSERVER if narrow else WIDE_OBSERVER, narrow=narrow)
    for parameter, verdict in verdicts.items():
        assert verdict.evidence == "observer"
        wanted = case.labels.get(parameter, "none")
        wanted = "none" if wanted in ("inert", "unknown") else wanted
        known = (name, parameter)
        if verdict.is_unknown:  # what is no matrix, or was not reached: it says nothing, and so nothing false
            assert wanted == "none" or not case.module.get_parameter(parameter).requires_grad, parameter
        elif label(verdict) != wanted and known not in UNVISITED_CLAMP | COARSER:
            assert not verdict.is_invariant, (parameter, wanted, label(verdict))
            assert "[" in wanted or name in BESIDE_A_BIAS, (parameter, wanted, verdict.z)


def bn_net(gain: float = 1.0) -> nn.Module:
    """A convolution before BatchNorm."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    net[0].weight.data.mul_(gain)
    return net


def test_too_few_gradients_say_nothing() -> None:
    """Infinite gradients, as of a step that a loss scaler skips, are not seen; neither are missing ones."""
    net = bn_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    observer = GradientObserver(named_roles(net), WIDE_OBSERVER)
    dispatcher = told_of(optimizer, observer)
    for step in range(33):
        for name, p in net.named_parameters():
            p.grad = torch.full_like(p, float("inf") if step > 1 else 1.0) if name == "0.weight" else None
        dispatcher.gradients_ready(0, optimizer)
        optimizer.step()
    verdicts = observer.verdict()
    assert verdicts["0.weight"].reason.startswith("A gradient reached it in 2 of the observed steps")
    assert verdicts["5.weight"].reason.startswith("A gradient reached it in 0 of the observed steps")


def test_an_optimizer_stepped_by_hand_is_seen_from_its_second_step_on() -> None:
    """Where nobody says that gradients are ready, the pre-hook looks."""
    torch.manual_seed(0)
    net = bn_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    observer = GradientObserver(named_roles(net), WIDE_OBSERVER)
    told_of(optimizer, observer)
    for _ in range(33):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.randn(8, 3, 6, 6)), torch.arange(8) % 3).backward()
        optimizer.step()
    verdict = observer.verdict()["0.weight"]
    assert verdict.kind == "neuron"
    assert "gradients of 7 training steps" in verdict.reason


@pytest.mark.parametrize("change, is_lost", [("nothing", False), ("frozen", True), ("tiny", True), ("penalty", True)])
def test_watchdog(change: str, is_lost: bool) -> None:
    """It is quiet on a healthy run, and barks once where BatchNorm is frozen, eps takes over, or the loss changes."""
    torch.manual_seed(0)
    net = bn_net()
    verdict = {"0.weight": label_of_rows(), "0.bias": label_of_rows(kind="inert")}
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    watchdog = InvarianceWatchdog(named_roles(net), verdict, WIDE_OBSERVER)
    dispatcher = told_of(optimizer, watchdog)
    lost = []
    for step in range(410):
        if step == 100 and change == "frozen":
            net[1].eval()
        if step == 100 and change == "tiny":
            net[0].weight.data.mul_(1e-3)
            optimizer.param_groups[0]["lr"] = 0.0  # at this effective rate one step would make them large again
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.randn(8, 3, 6, 6)), torch.arange(8) % 3)
        if change == "penalty":
            loss = loss + 0.1 * net[0].weight.square().sum()
        loss.backward()
        dispatcher.gradients_ready(0, optimizer)
        optimizer.step()
        lost.append(watchdog.lost())
    # Four steps from 20, 40, 80, 160 and 200 on; what changes, changes at 100, the penalty is there from the start.
    assert [bool(x) for x in lost].index(True) == (23 if change == "penalty" else 163) if is_lost else not any(lost)
    assert sum(map(bool, lost)) == is_lost


def label_of_rows(kind: Any = "neuron") -> ScaleInvariance:
    """A verdict on rows."""
    return ScaleInvariance(kind, dim=0 if kind == "neuron" else None, block_size=1 if kind == "neuron" else None)


def test_gradients_of_a_step_that_never_came_do_not_count() -> None:
    """A loss scaler that skips calls no optimizer; what it has skipped is replaced by the next gradients."""
    net = bn_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    observer = GradientObserver(named_roles(net), WIDE_OBSERVER)
    dispatcher = told_of(optimizer, observer)
    for step in range(33):
        for is_skipped in (True, False):
            for p in net.parameters():
                p.grad = torch.full_like(p, float("inf") if is_skipped else 1.0)
            dispatcher.gradients_ready(0, optimizer)
        optimizer.step()
        assert observer.steps == step + 1
    verdict = observer.verdict()["0.weight"]
    assert verdict.z is not None  # seen in enough steps, and finite
    assert 0 < verdict.z < float("inf")
