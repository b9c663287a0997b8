"""What callbacks that hold norms take up, and what goes along with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import NormProjection, NormSummary, RotationControl, ScaleInvariance
from tests.callbacks.test_field import Model, batches
from tests.harness import trainer

HYPERBALL: Any = {"include": ["*.weight"], "unit": "layer", "radius": "initial", "on_not_invariant": "allow"}


class Adapted(nn.Module):
    """A frozen weight beside an adapter of low rank, which begins at zero."""

    def __init__(self, entries: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, entries) / entries**0.5, requires_grad=False)
        self.first = nn.Linear(entries, 4, bias=False)
        self.second = nn.Linear(4, outputs, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Of their sum."""
        return x @ self.weight.T + self.second(self.first(x))  # type: ignore[no-any-return]


class LoRA(Model):
    """Six adapted layers, none of which is scale-invariant by itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        layers = [Adapted(6, 8), *(nn.Sequential(nn.LayerNorm(8), nn.ReLU(), Adapted(8, 8)) for _ in range(5))]
        self.net = nn.Sequential(*layers, nn.Linear(8, 3))


ZEROS = [name for name, p in LoRA().named_parameters() if name.endswith("second.weight")]


def norm(net: nn.Module, name: str) -> float:
    """Of a whole parameter."""
    return float(net.get_parameter(name).detach().double().norm())


@pytest.mark.parametrize("kind", [NormProjection, RotationControl])
def test_a_glob_takes_what_is_trained_and_says_what_it_leaves(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The line that an error proposes works where something is frozen; frozen weights keep every bit."""
    net = LoRA()
    before = copy.deepcopy(net.state_dict())
    with caplog.at_level("INFO"):
        trainer(kind(**HYPERBALL), max_epochs=2).fit(net, batches())
    left = [r.message for r in caplog.records if "takes what is trained" in r.message]
    assert len(left) == 1
    assert "leaves net.0.weight, net.1.2.weight" in left[0]
    for name, p in net.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name])
        elif name.endswith(".weight") and name not in ZEROS:
            assert norm(net, name) == pytest.approx(before[name].double().norm().item(), rel=1e-6)


def test_only_a_frozen_weight_named_in_full_is_an_error() -> None:
    """And so is a glob that matches nothing else."""
    for include in (["net.0.weight", "net.6.weight"], ["net.?.weight"]):
        net = LoRA()
        net.get_parameter("net.6.weight").requires_grad_(include[0] == "net.0.weight")
        with pytest.raises(ValueError, match=r"'net\.0\.weight'.* is frozen or in no optimizer\. Train it"):
            trainer(NormProjection(include=include, on_not_invariant="allow")).fit(net, batches())


class Thawing(LoRA):
    """Thaws a weight by hand, which its optimizer has had all the time."""

    def on_train_epoch_start(self) -> None:
        """In the second epoch."""
        self.get_parameter("net.0.weight").requires_grad_(self.current_epoch > 0)


def test_what_a_glob_has_left_is_held_when_it_is_thawed() -> None:
    """From its first step on, at the norm that it had."""
    net, projection = Thawing(), NormProjection(**HYPERBALL)
    before = net.get_parameter("net.0.weight").detach().clone()
    trainer(projection, max_epochs=3).fit(net, batches())
    assert not torch.equal(net.get_parameter("net.0.weight"), before)
    assert norm(net, "net.0.weight") == pytest.approx(before.double().norm().item(), rel=1e-6)
    assert "net.0.weight" in projection.held()


def test_a_frozen_weight_in_an_optimizer_is_not_projected() -> None:
    """Although it is scale-invariant by a verdict that is given."""
    net = Model()
    net.get_parameter("net.0.weight").requires_grad_(False)
    known = {name: ScaleInvariance("neuron", dim=0, block_size=1) for name in ("net.0.weight", "net.3.weight")}
    before = net.get_parameter("net.0.weight").clone()
    projection = NormProjection(invariance=known)
    trainer(projection, max_epochs=2).fit(net, batches())
    assert torch.equal(net.get_parameter("net.0.weight"), before)
    assert list(projection.held()) == ["net.3.weight"]
    assert net.get_parameter("net.3.weight").detach().norm(dim=1) == pytest.approx(torch.ones(8), abs=1e-6)


@pytest.mark.parametrize("kind", [NormProjection, RotationControl])
def test_what_starts_at_zero_is_taken_up_when_it_has_a_direction(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """At the norm that its first update gives it, which is a step of plain SGD; said once for all, in one line."""

    class Watching(LoRA):
        norms: tuple[list[float], ...] = ()

        def on_train_batch_end(self, *args: Any) -> None:
            self.norms = (*self.norms, [norm(self, name) for name in ZEROS])

    net, summary, holder = Watching(), NormSummary(), kind(**HYPERBALL)
    with caplog.at_level("INFO"):
        trainer(holder, summary, max_epochs=3).fit(net, batches())
    said = [r.message for r in caplog.records if "Zero at the start" in r.message]
    assert len(said) == 1
    assert said[0].startswith(f"Zero at the start, or in part: {', '.join(ZEROS[:5])} and 1 more.")
    assert len(net.norms) > 10
    assert min(net.norms[0]) > 0
    for later in net.norms[1:]:
        assert later == pytest.approx(net.norms[0], rel=1e-6)
    rows = {row["parameter"]: row for row in summary.rows()}
    assert all(rows[name]["radius"] != rows[name]["radius"] for name in ZEROS)  # not a number: none yet
    assert [holder.held()[name][1] for name in ZEROS] == pytest.approx(net.norms[0], rel=1e-6)


class Teacher(Model):
    """An average of the network, kept by hand, that the loss is to agree with, as in BYOL."""

    def __init__(self, memory: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = copy.deepcopy(self.net).requires_grad_(requires_grad=False)
        self.memory = memory

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy, and a distance from the teacher's outputs."""
        self.teacher.eval()  # as its statistics are not averaged, they are those that it has begun with
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        """The average goes on."""
        with torch.no_grad():
            for mean, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(p, 1 - self.memory)


def trained(net: Teacher) -> Teacher:
    """After an epoch, so that it has statistics of its own."""
    trainer(max_epochs=1).fit(net, batches())
    net.train()
    return net


def test_a_twin_follows_the_first_projection(caplog: pytest.LogCaptureFixture) -> None:
    """Multiplied by what its original is multiplied by, and its statistics with it: what it computes stays."""
    net = trained(Teacher())
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    old = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        before = net.teacher.eval()(x)
    net.lr, net.memory = 0.0, 1.0  # nothing but the projection
    net.train()
    with caplog.at_level("INFO"):
        trainer(NormProjection(), max_epochs=1, limit_train_batches=1).fit(net, batches())
    assert "follow the first projection (twins='follow'): teacher.0.weight, teacher.3.weight." in caplog.text
    for layer in ("0", "3"):
        for name in (f"net.{layer}.weight", f"net.{layer}.bias"):
            ours, twin = (net.get_parameter(n).detach().double() for n in (name, name.replace("net", "teacher")))
            factor = net.get_parameter(f"net.{layer}.weight").detach().double().flatten(1).norm(dim=1)
            factor = factor / old[f"net.{layer}.weight"].norm(dim=1)
            expected = old[name.replace("net", "teacher")]
            joined = not torch.allclose(ours, old[name])  # a bias follows where the probe says that it belongs
            expected = expected * (factor.view(-1, *[1] * (expected.ndim - 1)) if joined else 1.0)
            assert twin == pytest.approx(expected, rel=1e-5, abs=1e-7)
    with torch.no_grad():
        # Float32: a few hundred roundings of 6e-8 in outputs of size 1.
        assert net.teacher.eval()(x) == pytest.approx(before, abs=2e-5)


def test_a_twin_that_is_to_be_kept_or_is_none(caplog: pytest.LogCaptureFixture) -> None:
    """It keeps every bit, which is said; what has another direction is no twin."""
    for net, kwargs, said in ((trained(Teacher()), {"twins": "keep"}, True), (Teacher(), {}, False)):
        if not said:
            nn.init.normal_(net.teacher.get_parameter("0.weight"))
            nn.init.normal_(net.teacher.get_parameter("3.weight"))
        before = copy.deepcopy(net.teacher.state_dict())
        net.lr, net.memory = 0.0, 1.0
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer(NormProjection(**kwargs), max_epochs=1, limit_train_batches=1).fit(net, batches())
        assert ("are left as they are (twins='keep')" in caplog.text) == said
        assert ("Copies that no optimizer updates" in caplog.text) == said
        for name, value in net.teacher.named_parameters():
            assert torch.equal(value, before[name])


def test_an_unknown_word_for_twins() -> None:
    """Before anything is trained."""
    with pytest.raises(ValueError, match=r"`twins` must be 'follow' or 'keep', got 'no'"):
        NormProjection(twins="no")  # type: ignore[arg-type]
