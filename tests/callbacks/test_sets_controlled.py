"""Norm and angle of a set under control: nothing else of the scale of its tensors is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RAdam, RMSprop

from lightning_normreg import (
    CorrectedDecay,
    EffectiveLRMonitor,
    NormProjection,
    RotationControl,
    Symmetries,
    WeightNormMonitor,
    find_symmetries,
)
from lightning_normreg.steps import Projector, watch
from tests.callbacks.sets import ANGLE, DECAY, Stream, angle, fitted, flat, samples, writers
from tests.functional.test_recipes import exact_muon
from tests.symmetries._small_models import GPT, LLAMA, QWEN, VIT, Kind

__all__ = ["exact_muon"]

pytestmark = pytest.mark.filterwarnings("ignore:The Trainer has no logger")  # the history is read instead

KINDS = {"GPT-2": replace(GPT, tied=False), "Llama": LLAMA, "Qwen3": QWEN, "ViT": VIT}
EPS = 1e-40


def muon(groups: list[dict[str, Any]], lr: float) -> list[Optimizer]:
    """For matrices, and AdamW for the rest."""
    made: list[Optimizer] = []
    for make, its in ((Muon, True), (AdamW, False)):
        parts = [group | {"params": [p for p in group["params"] if (p.ndim == 2) == its]} for group in groups]
        made.append(make([part for part in parts if part["params"]], lr=lr, eps=EPS))
    return made


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "AdamW": partial(AdamW, eps=EPS),
    "Adam": partial(Adam, eps=EPS),
    "NAdam": partial(NAdam, eps=EPS, decoupled_weight_decay=True),
    "RAdam": partial(RAdam, eps=EPS, decoupled_weight_decay=True),
    "RMSprop": partial(RMSprop, eps=EPS),
    "Adagrad": partial(Adagrad, eps=EPS),
    "Lion": Lion,
    "Muon": muon,
}
PROPORTIONAL = [OPTIMIZERS[name] for name in ("SGD", "momentum", "RAdam")]  # RAdam in its first steps
QUICK = [("GPT-2", "SGD"), ("Llama", "AdamW"), ("Qwen3", "Lion"), ("ViT", "RMSprop"), ("Llama", "Muon")]
PAIRS = [
    pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
    for pair in ((name, optimizer) for name in KINDS for optimizer in OPTIMIZERS)
    if pair not in (("GPT-2", "Muon"), ("ViT", "Muon"))  # whose sets are not of matrices alone
]
DECOUPLED = ("AdamW", "NAdam", "RAdam", "Lion", "Muon")


@cache
def symmetries(kind: Kind) -> Symmetries:
    """Of a model, asked once."""
    return find_symmetries(made(kind, AdamW).train(), next(iter(samples(kind))))


class ByHand(Stream):
    """With several optimizers."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of each."""
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        before = self.whole()
        for optimizer in self.optimizers():
            optimizer.step()
        self.steps.append((before, self.whole()))


def made(kind: Kind, make: Callable[..., Any], scale: float = 1.0, decay: float | None = None) -> Stream:
    """A model in float64 whose writers are multiplied, and its optimizer; decay on the writers alone, if any."""
    torch.manual_seed(0)
    model = (ByHand if make is muon else Stream)(kind, depth=1).double()
    mine = writers(kind, 1)
    with torch.no_grad():
        for name in mine:
            model.get_parameter(name).mul_(scale)

    factor = 1e4 if make in PROPORTIONAL else 1.0

    def optimizer(parameters: Any, *, lr: float, weight_decay: float) -> Any:
        named = dict(model.named_parameters())
        rest = [p for name, p in named.items() if name not in mine]
        # Steps in proportion to gradients are a millionth of the weights, times the learning rate, at scale 1e3. That
        # float64 keeps 11 digits of their direction, it has to be large; the angle is a number anyway.
        groups = [
            {"params": [named[name] for name in mine], "lr": lr * factor, "weight_decay": decay or 0.0},
            {"params": rest, "weight_decay": 0.0},
        ]
        return make(groups, lr=lr)

    model.make = optimizer
    return model


def logits(model: Stream) -> Tensor:
    """Of the first samples."""
    return model(next(iter(samples(model.kind)))).detach()


def turned(kind: Kind, make: Callable[..., Any], **options: Any) -> Stream:
    """After a run under control."""
    model = made(kind, make, **options)
    fitted(model, RotationControl(ANGLE, unit="set", symmetries=symmetries(kind)), loader=samples(kind, count=64))
    return model


@pytest.mark.parametrize("name", KINDS)
def test_the_first_projection_keeps_the_logits(name: str) -> None:
    """To 1e-10, at another norm; with no radius given nothing moves at all, and both hold."""
    kind = KINDS[name]
    for radius in ("auto", 7.0):
        model = made(kind, AdamW)
        expected, norm = logits(model), float(flat(model.whole(), writers(kind, 1)).norm())
        fitted(model, NormProjection(radius, unit="set", symmetries=symmetries(kind)))  # type: ignore[arg-type]
        held = norm if radius == "auto" else radius
        for before, after in model.steps:
            assert [float(flat(w, writers(kind, 1)).norm()) for w in (before, after)] == pytest.approx([held] * 2)
        model.load_state_dict(model.steps[0][0])
        assert float((logits(model) - expected).abs().max()) < 1e-10


def test_without_a_trainer_nothing_but_sets_and_units_is_held() -> None:
    """Without a verdict the set alone, at whatever norm: the logits stay, to roundoff. A tied head leaves none."""
    model = made(LLAMA, AdamW)
    expected = logits(model)
    targets = watch(model, symmetries=symmetries(LLAMA), unit="set")
    Projector(targets, 7.0).project(targets)
    assert float(flat(model.whole(), writers(LLAMA, 1)).norm()) == pytest.approx(7.0)
    assert float((logits(model) - expected).abs().max()) < 1e-10
    tied = replace(LLAMA, tied=True)
    with pytest.raises(ValueError, match="but there is neither"):
        watch(made(tied, AdamW), symmetries=symmetries(tied), unit="set")


@pytest.mark.parametrize("control", [NormProjection, partial(RotationControl, ANGLE, hold="mean")])
def test_a_run_under_control_resumes(control: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Bit for bit, at the radius of the first start, and without asking again."""
    whole, first, second = (Stream(LLAMA, depth=1) for _ in range(3))
    torch.manual_seed(0)
    state = {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in whole.named_parameters()}
    for model in (whole, first, second):
        model.load_state_dict(state)
    fitted(whole, control(unit="set"), max_epochs=2)
    fitted(first, control(unit="set")).save_checkpoint(tmp_path / "half.ckpt")

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("lightning_normreg.callbacks._probing.find_symmetries", asked)
    resumed = control(unit="set")
    fitted(second, resumed, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert len(second.steps) == 4
    for name, p in whole.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
    assert [*resumed.held()] == ["residual_stream"]


def test_what_cannot_be_held_as_a_set() -> None:
    """Said before the first step, with a remedy."""
    with pytest.raises(ValueError, match=r"`symmetries` must not be None with unit='set'"):
        NormProjection(unit="set", symmetries=None)
    with pytest.raises(ValueError, match=r"neither by themselves nor together. With a tied head"):
        fitted(Stream(GPT, depth=1), NormProjection(unit="set"))
    with pytest.raises(ValueError, match=r"scale-invariant by itself.*NormProjection\(unit='set'\)"):
        fitted(Stream(LLAMA, depth=1), NormProjection())
    with pytest.raises(ValueError, match=r"`include` must name scale-invariant weights, but 'net\.head\.weight'"):
        fitted(Stream(LLAMA, depth=1), NormProjection(unit="set", include=["*head*", "*embed*"]))
    with pytest.raises(ValueError, match="neither by themselves nor together"):
        fitted(Stream(LLAMA, depth=1), NormProjection(unit="set", exclude=["*embed*"]))


def test_a_set_that_eps_rules_and_one_with_a_scalar() -> None:
    """The first is refused for its eps, not called something else; the second has its curves, under another name."""
    found = symmetries(LLAMA)
    (stream,) = (s for s in found.basis if s.kind == "set")
    others = tuple(s for s in found.basis if s is not stream)
    ruled = replace(found, basis=(replace(stream, eps_share=0.2), *others))
    with pytest.raises(ValueError, match="residual_stream is scale-invariant only where eps is negligible"):
        fitted(Stream(LLAMA, depth=1), NormProjection(unit="set", symmetries=ruled))

    class Scaled(Stream):
        def __init__(self) -> None:
            super().__init__(LLAMA, depth=1)
            self.net.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, batch: Tensor) -> Tensor:
            return super().forward(batch) + 0 * self.net.scale

    names = ("net.embed.weight", "net.scale", "net.blocks.0.q.weight[0:4]")
    with_scalar = replace(stream, exponents=dict.fromkeys(names, 1))
    given = replace(found, basis=(stream, with_scalar, *others), tensors=(*found.tensors, *names[1:]))
    model, monitor, norms = Scaled().double(), EffectiveLRMonitor(symmetries=given), WeightNormMonitor(symmetries=given)
    fitted(model, monitor, norms)
    assert "weights/equilibrium_norm/residual_stream_2" in monitor.history()
    for (before, after), row, norm in zip(
        model.steps, monitor.history().to_dict("records"), norms.history().to_dict("records"), strict=True
    ):
        a, b = (
            torch.cat(
                [w["net.embed.weight"].flatten(), w["net.scale"].flatten(), w["net.blocks.0.q.weight"][:4].flatten()]
            )
            for w in (before, after)
        )
        assert norm["weights/weight_norm/residual_stream_2"] == pytest.approx(float(a.norm()), rel=1e-12)
        assert row["weights/rotation/residual_stream_2"] == pytest.approx(angle(a, b), rel=1e-10)


def test_a_search_that_takes_too_long(caplog: pytest.LogCaptureFixture) -> None:
    """Is not made: a monitor says so and goes on without sets, what is to hold a set says how to get the answer."""
    model = Stream(LLAMA, depth=1)
    for number in range(60):
        setattr(model, f"extra_{number}", torch.nn.Linear(1 + number, 1))
    with pytest.raises(ValueError, match=r"`unit='set'` must know .* passes. Write find_symmetries\(module, batch\)"):
        fitted(model, NormProjection(unit="set"))
    monitor = EffectiveLRMonitor()
    with caplog.at_level("INFO"):
        fitted(model, monitor)
    assert caplog.text.count("was not asked, as that is") == 1
    assert not [tag for tag in monitor.history() if "residual_stream" in tag]


class Apart(Stream):
    """The embedding at another learning rate."""

    def configure_optimizers(self) -> Any:
        """Two groups."""
        rest = [p for name, p in self.named_parameters() if "embed" not in name]
        return AdamW([{"params": self.net.embed.parameters(), "lr": 0.001}, {"params": rest}], lr=0.01, weight_decay=0)


@pytest.mark.slow
def test_unequal_rates_in_a_set() -> None:
    """An angle that is the learning rate is refused; a number is not, and the set turns by it."""
    with pytest.raises(ValueError, match=r"one angle for all of 'residual_stream', but its tensors have unequal lr"):
        fitted(Apart(), RotationControl(unit="set"))
    model = Apart().double()
    monitor = EffectiveLRMonitor()
    fitted(model, RotationControl(ANGLE, unit="set"), monitor)
    for before, after in model.steps:
        assert angle(flat(before, writers()), flat(after, writers())) == pytest.approx(ANGLE, rel=1e-10)
    assert not [tag for tag in monitor.history() if "effective_lr/" in tag]  # there is no one rate
    assert "weights/rotation/residual_stream" in monitor.history()
    with pytest.warns(UserWarning, match="The tensors of 'residual_stream' have unequal lr"):
        fitted(Apart(), CorrectedDecay(unit="set"))


@pytest.mark.parametrize("name, optimizer", PAIRS)
@pytest.mark.usefixtures("exact_muon")
def test_the_set_turns_by_the_angle_whatever_its_scale(name: str, optimizer: str) -> None:
    """Multiplied by 1e-3 or 1e3 at the start, the run is the same in the logits: to 1e-9, after 8 steps in float64."""
    kind, make = KINDS[name], OPTIMIZERS[optimizer]
    runs = {scale: turned(kind, make, scale=scale) for scale in (1.0, 1e-3, 1e3)}
    for model in runs.values():
        for before, after in model.steps:
            turn = angle(flat(before, writers(kind, 1)), flat(after, writers(kind, 1)))
            assert abs(turn - ANGLE) <= 1e-10 * ANGLE
    moved = (logits(runs[1.0]) - logits(made(kind, make))).abs().max()
    assert float(moved) > 0.01
    for scale in (1e-3, 1e3):
        assert float((logits(runs[scale]) - logits(runs[1.0])).abs().max()) < 1e-9


@pytest.mark.parametrize("name, optimizer", [pair for pair in PAIRS if pair.values[1] in DECOUPLED])
@pytest.mark.usefixtures("exact_muon")
def test_decay_of_the_set_is_without_effect(name: str, optimizer: str) -> None:
    """Decoupled, the same on all of it: to 1e-9. Without control it has one."""
    kind, make = KINDS[name], OPTIMIZERS[optimizer]
    plain, decayed = turned(kind, make), turned(kind, make, decay=DECAY)
    assert float((logits(plain) - logits(decayed)).abs().max()) < 1e-9
    free = [made(kind, make, decay=decay) for decay in (0.0, 1.0)]
    for model in free:
        fitted(model, loader=samples(kind, count=64))
    assert float((logits(free[0]) - logits(free[1])).abs().max()) > 1e-3
