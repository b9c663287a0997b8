"""`DecayFreeLR` against the same optimizer and schedule with decay."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, ReduceLROnPlateau, StepLR

from lightning_normreg import DecayFreeLR
from lightning_normreg import functional as F
from tests.functional.test_recipes import DECAY, EXACT, STEPS, exact_muon, largest_angle, set_gradient, start
from tests.symmetries._small_models import batch_norm

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.3}),
    "heavy ball": (SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.8}),
    "AdamW": (AdamW, {"lr": 0.03, "eps": 1e-2, "amsgrad": True}),
    "NAdamW": (NAdam, {"lr": 0.03, "eps": 1e-2, "decoupled_weight_decay": True}),
    "Lion": (Lion, {"lr": 0.03}),
    "Muon": (Muon, {"lr": 0.03}),
}
INNER: dict[str, Callable[[Optimizer], LRScheduler | None]] = {
    "constant": lambda optimizer: None,
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS),
    "step": lambda optimizer: StepLR(optimizer, step_size=20, gamma=0.1),
    "warm-up": lambda optimizer: LinearLR(optimizer, start_factor=0.05, total_iters=20),
}
__all__ = ["exact_muon"]


def steps(optimizer: Optimizer, scheduler: LRScheduler | None, times: range = range(STEPS)) -> list[Tensor]:
    """The first group's weight after each step."""
    weights = []
    for t in times:
        for group in optimizer.param_groups:
            for w in group["params"]:
                set_gradient(w, t)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        weights.append(optimizer.param_groups[0]["params"][0].detach().clone())
    return weights


def made(name: str, decay: float = DECAY) -> Optimizer:
    """An optimizer of one weight."""
    make, options = OPTIMIZERS[name]
    return make([start()], weight_decay=decay, **options)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.usefixtures("exact_muon")
def test_turns_as_decay_does(name: str, inner: str, project: bool) -> None:
    """With the decay taken over, the weight turns as under the schedule with decay, and s is between the two."""
    decayed = made(name)
    expected = steps(decayed, INNER[inner](decayed))
    optimizer = made(name)
    scheduler = DecayFreeLR(optimizer, INNER[inner](optimizer), project=project)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    weights = steps(optimizer, scheduler)
    assert largest_angle(expected, weights) < EXACT
    torch.testing.assert_close(expected[-1], scheduler.scales[0] * weights[-1], rtol=EXACT, atol=EXACT)
    if project:
        norms = torch.stack([w.norm() for w in weights])
        torch.testing.assert_close(norms, start().detach().norm().expand(STEPS), rtol=1e-14, atol=0.0)
    plain = made(name, decay=0.0)
    assert largest_angle(expected, steps(plain, INNER[inner](plain))) > 1e-4


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.usefixtures("exact_muon")
def test_several_weights_in_a_group(name: str) -> None:
    """Layers before BatchNorm, each scale-invariant by itself, turn as under decay where their joint norm is held."""
    make, options = OPTIMIZERS[name]
    runs = []
    for project in (None, True):
        torch.manual_seed(0)
        net = batch_norm()[0].double()
        layers = [net[0][0].weight, net[1][0].weight]
        layers[0].data.mul_(3.0)  # the two relax towards their equilibria at different rates
        optimizer = make(
            [{"params": layers, "weight_decay": DECAY}, {"params": [net[2].weight], "weight_decay": 0.0}], **options
        )
        schedule = INNER["cosine"](optimizer)
        scheduler = schedule if project is None else DecayFreeLR(optimizer, schedule, project=True)
        norms = []
        for t in range(STEPS):
            x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), x.argmax(1) % 3).backward()
            optimizer.step()
            assert scheduler is not None
            scheduler.step()
            norms.append(torch.stack([w.detach().norm() for w in layers]))
        runs.append((net(x).detach(), layers, torch.stack(norms)))
    (expected, decayed, _), (logits, free, norms) = runs
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=EXACT)
    for pair in zip(decayed, free, strict=True):
        assert largest_angle(*([w.detach()] for w in pair)) < EXACT
    torch.testing.assert_close(norms.norm(dim=1), norms[:1].norm(dim=1).expand(STEPS), rtol=1e-14, atol=0.0)
    assert float((norms[-1] / norms[0] - 1).abs().max()) > 1e-3  # each by itself is not held


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.usefixtures("exact_muon")
def test_resumes(name: str, project: bool) -> None:
    """From a checkpoint of plain numbers it goes on with the same bits."""
    optimizer = made(name)
    scheduler = DecayFreeLR(optimizer, INNER["cosine"](optimizer), project=project)
    whole = steps(optimizer, scheduler)
    optimizer = made(name)
    scheduler = DecayFreeLR(optimizer, INNER["cosine"](optimizer), project=project)
    half = steps(optimizer, scheduler, range(30))
    checkpoint = io.BytesIO()
    torch.save({"w": half[-1], "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, checkpoint)
    checkpoint.seek(0)
    loaded = torch.load(checkpoint, weights_only=True)
    optimizer = made(name)
    scheduler = DecayFreeLR(optimizer, INNER["cosine"](optimizer), project=project)
    optimizer.param_groups[0]["params"][0].data.copy_(loaded["w"])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    assert torch.equal(whole[-1], steps(optimizer, scheduler, range(30, STEPS))[-1])


def test_agrees_with_the_function() -> None:
    """Its learning rates are those that `without_decay` lists, and groups without decay keep theirs."""
    optimizer = SGD(
        [{"params": [start()], "weight_decay": DECAY}, {"params": [start(), start()], "lr": 0.7}], lr=0.1, momentum=0.5
    )
    scheduler = DecayFreeLR(optimizer)
    rates = []
    for t in range(10):
        rates.append(scheduler.get_last_lr())
        steps(optimizer, scheduler, range(t, t + 1))
    assert [rate for rate, _ in rates] == pytest.approx(F.without_decay("sgd", [0.1] * 10, DECAY, momentum=0.5).lrs)
    assert {rate for _, rate in rates} == {0.7}


def test_tensor_learning_rates() -> None:
    """A learning rate that is a tensor stays one, and has the same values."""
    rates: list[list[float]] = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        optimizer = SGD([start()], lr=lr, weight_decay=DECAY)
        scheduler = DecayFreeLR(optimizer, INNER["cosine"](optimizer))
        rates.append([])
        for t in range(10):
            rates[-1].append(float(optimizer.param_groups[0]["lr"]))
            steps(optimizer, scheduler, range(t, t + 1))
        assert type(optimizer.param_groups[0]["lr"]) is type(lr)
    assert rates[0] == pytest.approx(rates[1], rel=1e-14)


def test_skipped_step() -> None:
    """Where a loss scaler skips a step, there is no decay to follow, and the schedule goes on."""
    optimizer = SGD([start()], lr=0.1, weight_decay=DECAY)
    scheduler = DecayFreeLR(optimizer, StepLR(optimizer, step_size=1, gamma=0.5))
    steps(optimizer, scheduler, range(1))
    before = list(scheduler.scales)
    scheduler.step()
    assert scheduler.scales == before
    assert scheduler.get_last_lr()[0] == pytest.approx(0.025 / (0.95**2 * (1 - 0.025 * DECAY)), rel=1e-14)


def test_two_steps_at_once() -> None:
    """A schedule stepped once per epoch would miss decay: an error that says what to return to Lightning."""
    optimizer = SGD([start()], lr=0.1, weight_decay=DECAY)
    scheduler = DecayFreeLR(optimizer)
    steps(optimizer, None, range(2))
    with pytest.raises(RuntimeError, match="after every optimizer step, but there were 2 since the last time"):
        scheduler.step()


@pytest.mark.parametrize(
    "optimizer, words",
    [
        (SGD([start()], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), "SGD with Nesterov momentum"),
        (Adam([start()], weight_decay=0.1), "Adam with these settings"),
        (RMSprop([start()], weight_decay=0.1), "RMSprop with these settings"),
        (RAdam([start()], weight_decay=0.1, decoupled_weight_decay=True), "RAdam with these settings"),
    ],
)
def test_optimizers_without_an_exact_conversion(optimizer: Optimizer, words: str) -> None:
    """They are refused in words."""
    with pytest.raises(ValueError, match=f"`optimizer` must be one whose decay has an exact conversion, got {words}"):
        DecayFreeLR(optimizer)


class Own(Tensor):
    """A tensor of somebody's own, as a sharded one is."""


def test_arguments_that_do_not_fit() -> None:
    """Schedules of another optimizer or of a metric, and groups that cannot be projected, are refused."""
    optimizer = SGD([start()], lr=0.1, weight_decay=DECAY)
    other = StepLR(SGD([start()], lr=0.1), 1)
    with pytest.raises(ValueError, match="`schedule` must be made for the same `optimizer`"):
        DecayFreeLR(optimizer, other)
    with pytest.raises(TypeError, match="`schedule` must not need a metric"):
        DecayFreeLR(optimizer, ReduceLROnPlateau(optimizer))
    zeros = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"ordinary tensors that are not all zero .* got zeros\. Leave `project` out"):
        DecayFreeLR(SGD(zeros, lr=0.1, weight_decay=DECAY), project=True)
    DecayFreeLR(SGD([start(), *zeros], lr=0.1, weight_decay=DECAY), project=True)
    other = nn.Parameter(start().detach().as_subclass(Own))
    with pytest.raises(ValueError, match=r"ordinary tensors .* got Own\. Leave `project` out"):
        DecayFreeLR(SGD([start(), other], lr=0.1, weight_decay=DECAY), project=True)
