"""A step that keeps state, or draws from generators of its own, gets the verdict of its stateless twin."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_normreg import find_scale_invariance
from tests.symmetries._labels import label

BATCH = (torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)


class Plain(nn.Module):
    """Two layers with BatchNorm between them; subclasses add a term that is not scale-invariant, times `weight()`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def factor(self, logits):
        """Of the loss."""
        return 1.0

    def training_step(self, batch, batch_idx):
        """Cross entropy."""
        logits = self.net(batch[0])
        return F.cross_entropy(logits, batch[1]) * self.factor(logits)


class Annealed(Plain):
    """A counter in the module, as in KL annealing, and one in a plain object."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.schedule = 0, type("Schedule", (), {"seen": None})()
        self.schedule.seen = []

    def factor(self, logits):
        """Grows from call to call."""
        self.steps += 1
        self.schedule.seen.append(self.steps)
        return 1 + 0.1 * self.steps + 0.2 * len(self.schedule.seen)


class Noisy(Plain):
    """Four generators of its own, one of them in a list in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.numpy, self.old = np.random.default_rng(0), np.random.RandomState(0)
        self.torch = torch.Generator().manual_seed(0)
        self.more = {"python": [random.Random(0)]}

    def factor(self, logits):
        """Noise from all of them."""
        noise = torch.rand((), generator=self.torch) + self.numpy.random() + self.old.rand()
        return 1 + noise + self.more["python"][0].random()


class Recurrent(Plain):
    """The last hidden state is kept, in the graph, and comes back in the next call."""

    hidden = None

    def factor(self, logits):
        """Depends on the outputs before."""
        before = 0 if self.hidden is None else self.hidden.detach()
        self.hidden = logits.mean()
        return 1 + (self.hidden + before).tanh() / 2


class Relative(Plain):
    """The loss is divided by its own running mean, a tensor that is no buffer, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.ones(())

    def factor(self, logits):
        """One over the running mean."""
        self.mean.mul_(0.5).add_(logits.detach().square().mean(), alpha=0.5)
        return 1 / self.mean.clone()


@pytest.mark.parametrize("kind", [Annealed, Noisy, Recurrent, Relative])
@pytest.mark.parametrize("seed", [0, 1])
def test_state_changes_no_verdict(kind, seed):
    """The same as that of the step without state; and the module's own state has not moved."""
    torch.manual_seed(seed)
    module = kind().train()
    if kind is Recurrent:  # as after a step of training
        module.training_step(BATCH, 0)
    states = [g.get_state() for g in (module.torch,)] if kind is Noisy else []
    found = find_scale_invariance(module, BATCH, seed=seed)
    expected = find_scale_invariance(Plain(), BATCH, seed=seed)
    assert {name: label(v) for name, v in found.items()} == {name: label(v) for name, v in expected.items()}
    assert expected["net.0.weight"].kind == "neuron"
    if kind is Annealed:
        assert (module.steps, module.schedule.seen) == (0, [])
    if kind is Noisy:
        assert torch.equal(states[0], module.torch.get_state())
        assert module.numpy.random() == np.random.default_rng(0).random()
        assert module.more["python"][0].random() == random.Random(0).random()


COUNT = [0]


def test_a_state_that_no_copy_has_leaves_eulers_relation():
    """A counter outside of the module: two calls differ whatever is copied, and that is no refutation."""

    class Outside(Plain):
        def factor(self, logits):
            COUNT[0] += 1
            return 1 + 0.1 * COUNT[0]

    verdicts = find_scale_invariance(Outside(), BATCH)
    assert verdicts["net.0.weight"].kind == "neuron"
    assert "rests on Euler's relation alone" in verdicts["net.0.weight"].reason
    assert verdicts["net.3.weight"].kind == "none"
