"""Decay on a set is a schedule, in a Trainer: a transformer's writers, of which no one is scale-invariant by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.utils.data import DataLoader

from lightning_normreg import DecayFreeLR, find_symmetries, reduce_decay
from tests.functional.test_recipes import exact_muon
from tests.harness import trainer
from tests.symmetries._small_models import LENGTH, LLAMA, WORDS, Transformer

__all__ = ["exact_muon"]

STEPS = 60
EXACT = 1e-12
IN_BFLOAT16 = 3e-3
"""Of logits of standard deviation 0.3, at this learning rate. Newton–Schulz rounds to 2^-9 in bfloat16, which does not
commute with factors that are no powers of 2; what becomes of it in 60 steps grows with the learning rate."""
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.02, "momentum": 0.9}),
    "AdamW": (AdamW, {"lr": 0.02, "eps": 1e-40}),
    "Lion": (Lion, {"lr": 0.01}),
    "Muon": (Muon, {"lr": 0.005, "eps": 1e-40}),
}
WRITERS = frozenset({"net.embed.weight", "net.blocks.0.o.weight", "net.blocks.0.down.weight"})


class Llama(LightningModule):
    """With decay on the named weights; given to a schedule, or as it is."""

    def __init__(
        self, optimizer: str, rates: dict[str, tuple[float, float]], free: bool, project: bool = False
    ) -> None:
        super().__init__()
        self.net = Transformer(LLAMA)
        self.make, self.options = OPTIMIZERS[optimizer]
        self.rates, self.free, self.project = rates, free, project

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy of the next word."""
        return nn.functional.cross_entropy(self.net(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        """One group for each rate, as (factor of the learning rate, decay); Muon takes matrices only."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in self.named_parameters():
            if p.ndim == 2 or self.make is not Muon:
                groups.setdefault(self.rates.get(name, (1.0, 0.0)), []).append(p)
        lr = self.options["lr"]
        entries = [{"params": p, "lr": lr * factor, "weight_decay": d} for (factor, d), p in groups.items()]
        optimizer = self.make(entries, **self.options)
        if not self.free:
            return optimizer
        scheduler = DecayFreeLR(optimizer, project=self.project)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def logits(optimizer: str, rates: dict[str, tuple[float, float]], free: bool, project: bool = False) -> Tensor:
    """Of the last words, after a run of one epoch in float64."""
    torch.manual_seed(0)
    model = Llama(optimizer, rates, free, project)
    decayed = [model.get_parameter(name) for name in rates]
    norm = joint_norm(decayed)
    words = torch.randint(WORDS, (4 * STEPS, LENGTH))
    trainer(precision="64-true").fit(model, DataLoader(words, batch_size=4))  # type: ignore[arg-type]
    assert model.global_step == STEPS
    assert (joint_norm(decayed) == pytest.approx(norm, rel=1e-12)) == project
    return model.net(words[-4:]).detach()


def joint_norm(weights: list[nn.Parameter]) -> float:
    """Of the concatenation."""
    return float(torch.cat([w.detach().double().flatten() for w in weights]).norm())


def difference(optimizer: str, rates: dict[str, tuple[float, float]], project: bool = False) -> float:
    """Between the run with decay and the one with a schedule, or with projection too, in its place."""
    return float((logits(optimizer, rates, free=False) - logits(optimizer, rates, True, project)).abs().max())


def rates_of(names: Collection[str], optimizer: str) -> dict[str, tuple[float, float]]:
    """1 % off all of these in each step; heavy ball makes ten times 0.2 % of it."""
    share = 0.002 if optimizer == "SGD" else 0.01
    return dict.fromkeys(names, (1.0, share / OPTIMIZERS[optimizer][1]["lr"]))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("exact_muon")
def test_decay_of_the_writers_is_a_schedule(name: str) -> None:
    """To 60 steps' roundoff; that of all other matrices is not, nor that of a part of the set.

    The set's names are those that `find_symmetries` gives.
    """
    others = {n for n, p in Llama(name, {}, free=False).named_parameters() if p.ndim == 2} - WRITERS
    assert difference(name, rates_of(WRITERS, name)) < EXACT
    assert difference(name, rates_of(others, name)) > 0.05
    assert difference(name, rates_of(WRITERS - {"net.embed.weight"}, name)) > 0.05


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("exact_muon")
def test_decay_of_the_writers_is_projection(name: str) -> None:
    """With the set's joint norm held, its members' are free."""
    assert difference(name, rates_of(WRITERS, name), project=True) < EXACT


def test_muon_in_bfloat16() -> None:
    """As it is."""
    for project in (False, True):
        assert difference("Muon", rates_of(WRITERS, "Muon"), project) < IN_BFLOAT16


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_what_has_to_be_equal_in_a_set(name: str) -> None:
    """Learning rate times decay: with half of one and twice of the other it is a schedule; without that it is none.

    `reduce_decay` says which it is, before a run. Held it must be in one group: in two each part gets a norm.
    """
    equal = rates_of(WRITERS, name)
    unequal = dict(equal)
    factor, decay = equal["net.embed.weight"]
    equal["net.embed.weight"] = (factor / 2, decay * 2)
    unequal["net.embed.weight"] = (factor, decay / 2)
    torch.manual_seed(0)
    symmetries = find_symmetries(Llama(name, {}, free=False).train(), torch.randint(WORDS, (4, LENGTH)))
    assert any(s.kind == "set" and {*s.exponents} == WRITERS for s in symmetries.basis)
    for rates, is_schedule in ((equal, True), (unequal, False)):
        lr = OPTIMIZERS[name][1]["lr"]
        labels = reduce_decay(symmetries, {n: lr * factor * decay for n, (factor, decay) in rates.items()}).labels
        assert ({labels[n] for n in WRITERS} == {"schedule"}) == is_schedule
        assert (difference(name, rates) < EXACT) == is_schedule
    assert difference(name, equal, project=True) > 1e-3
