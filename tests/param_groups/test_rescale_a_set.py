"""All tensors of a set are multiplied while a transformer trains: no one of them is scale-invariant by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Muon, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_normreg import accept_rescaled, rescale_
from tests.functional.test_recipes import exact_muon
from tests.param_groups.test_decay_of_a_set import EXACT, IN_BFLOAT16, OPTIMIZERS, WRITERS
from tests.symmetries._small_models import LENGTH, LLAMA, WORDS, Transformer, log_loss

__all__ = ["exact_muon"]

FACTOR = 3.7
STEPS, RESCALED, SAVED = 40, 15, 25


class Run:
    """A pre-norm transformer in float64. Of its set the embedding is in another group than the other members."""

    def __init__(self, name: str, seed: int = 0) -> None:
        make, options = OPTIMIZERS[name]
        torch.manual_seed(seed)
        self.seed, self.net = seed, Transformer(LLAMA).double()
        self.trained = [p for p in self.net.parameters() if p.ndim == 2 or make is not Muon]
        self.set = [p for name, p in self.net.named_parameters() if f"net.{name}" in WRITERS]
        embedding, others = self.trained[:1], self.trained[1:]
        groups = [{"params": others, "weight_decay": 0.3}, {"params": embedding, "weight_decay": 0.1}]
        self.optimizer: Optimizer = make(groups, **options)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=STEPS)

    def train(self, steps: Iterable[int]) -> Tensor:
        """Logits after steps on given batches."""
        for t in steps:
            generator = torch.Generator().manual_seed(1000 * self.seed + t)
            batch = torch.randint(WORDS, (4, LENGTH), generator=generator)
            self.optimizer.zero_grad()
            log_loss(self.net, batch).backward()
            self.optimizer.step()
            self.scheduler.step()
        return self.net(torch.arange(4 * LENGTH).reshape(4, LENGTH) % WORDS).detach()

    def rescale(self, weights: Sequence[nn.Parameter] | None = None) -> list[dict[str, Any]]:
        """What is tested."""
        weights = self.set if weights is None else weights
        return rescale_(self.optimizer, weights, FACTOR, schedulers=[self.scheduler])


def apart(name: str, change: Callable[[Run], object], seed: int = 0) -> float:
    """Largest difference in logits that a change in the middle of a run makes at its end."""
    plain, changed = Run(name, seed), Run(name, seed)
    changed.train(range(RESCALED))
    change(changed)
    return float((plain.train(range(STEPS)) - changed.train(range(RESCALED, STEPS))).abs().max())


def multiply(run: Run) -> None:
    """What happens where nothing follows."""
    for w in run.set:
        w.data.mul_(FACTOR)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("exact_muon")
def test_logits_go_on(name: str) -> None:
    """To rounding, under decay and a schedule; not where a member is left out, or nothing follows."""
    assert apart(name, Run.rescale) < EXACT
    assert apart(name, lambda run: run.rescale(run.set[1:])) > 1e-4
    assert apart(name, multiply) > 1e-4


def test_muon_in_bfloat16() -> None:
    """As it is."""
    assert apart("Muon", Run.rescale) < IN_BFLOAT16


def test_one_new_group_for_each_old_one() -> None:
    """Weights of one group stay together; all weights of a group stay where they are."""
    run = Run("SGD")
    before = copy.deepcopy(run.optimizer.param_groups)
    new, embedding = run.rescale(run.set[::-1])
    assert [*map(id, run.optimizer.param_groups[1:])] == [id(embedding), id(new)]
    assert [*map(id, new["params"])] == [*map(id, run.set[1:])]
    assert [*map(id, embedding["params"])] == [id(run.set[0])]
    assert len(run.optimizer.param_groups[0]["params"]) == len(run.trained) - len(run.set)
    assert run.optimizer.param_groups[0]["lr"] == before[0]["lr"]
    for group, old in ((new, before[0]), (embedding, before[1])):
        assert group["lr"] == pytest.approx(old["lr"] * FACTOR**2, rel=1e-14)
        assert group["weight_decay"] == pytest.approx(old["weight_decay"] / FACTOR**2, rel=1e-14)
    assert run.scheduler.get_last_lr() == [group["lr"] for group in run.optimizer.param_groups]
    assert run.rescale(run.set[1:]) == [new]  # alone in its group by now
    assert len(run.optimizer.param_groups) == 3


def test_resume() -> None:
    """Also where a new group was split again: a fresh optimizer splits alike, and goes on with the same bits."""
    run = Run("AdamW")
    run.train(range(RESCALED))
    run.rescale()
    run.rescale(run.set[2:])
    run.train(range(RESCALED, SAVED))
    states = copy.deepcopy([part.state_dict() for part in (run.net, run.optimizer, run.scheduler)])
    fresh = Run("AdamW", seed=1)
    accept_rescaled(fresh.optimizer, [fresh.scheduler])
    for part, state in zip((fresh.net, fresh.optimizer, fresh.scheduler), states, strict=True):
        part.load_state_dict(state)
    fresh.seed = run.seed
    lengths = [[len(group["params"]) for group in r.optimizer.param_groups] for r in (run, fresh)]
    assert lengths[0] == lengths[1] == [len(run.trained) - 3, 1, 1, 1]
    assert torch.equal(run.train(range(SAVED, STEPS)), fresh.train(range(SAVED, STEPS)))


def test_states_from_before() -> None:
    """Those in which one position was a number are loaded as ever."""
    ws = [[nn.Parameter(torch.ones(2)) for _ in range(3)] for _ in range(2)]
    optimizer, fresh = (SGD(w, lr=0.1) for w in ws)
    rescale_(optimizer, ws[0][1], 2.0)
    state = optimizer.state_dict()
    assert state["param_groups"][1]["split_from"] == (0, [1])
    state["param_groups"][1]["split_from"] = (0, 1)
    accept_rescaled(fresh)
    fresh.load_state_dict(state)
    assert [[any(p is w for p in g["params"]) for w in ws[1]] for g in fresh.param_groups] == [
        [True, False, True],
        [False, True, False],
    ]


def test_lbfgs_of_a_set() -> None:
    """Its one history follows if all its weights are multiplied."""
    logits = []
    for factor in (1.0, FACTOR):
        run = Run("SGD")
        optimizer = LBFGS(run.set, lr=0.05, history_size=4, max_iter=3)

        def closure(run: Run = run, optimizer: Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = log_loss(run.net, torch.arange(4 * LENGTH).reshape(4, LENGTH) % WORDS)
            loss.backward()
            return loss

        for t in range(6):  # few: it amplifies rounding, as it divides by differences
            if t == 4:
                rescale_(optimizer, run.set, factor)
            optimizer.step(closure)  # type: ignore[arg-type]
        logits.append(run.train([]))
    torch.testing.assert_close(*logits, rtol=0.0, atol=EXACT)


@pytest.mark.parametrize(
    "choose, error, words",
    [
        (lambda ws, other: [], ValueError, "`parameter` must be at least one weight, .* got 0"),
        (lambda ws, other: [*ws, ws[0]], ValueError, "each only once, got 3 of which 2 are different"),
        (lambda ws, other: [*ws, other], ValueError, r"one of the optimizer's, got one of shape \(3,\)\. Of a set in"),
        (lambda ws, other: ["a.weight"], TypeError, "`parameter` must be a weight or several, got str"),
        (lambda ws, other: 3, TypeError, "`parameter` must be a weight or several, got int"),
    ],
)
def test_lists_that_are_none(choose: Callable[..., Any], error: type[Exception], words: str) -> None:
    """They are refused in words, and nothing has changed."""
    ws = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SGD([*ws, nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(error, match=words):
        rescale_(optimizer, choose(ws, nn.Parameter(torch.ones(3))), 2.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3]
    assert all(torch.equal(w, torch.ones(2)) for w in ws)


def test_a_later_group_that_cannot_follow() -> None:
    """Nothing has changed in the first group either."""
    ws = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    optimizer = torch.optim.RAdam([{"params": ws[:2]}, {"params": ws[2:]}], lr=0.1)
    for _ in range(8):
        for w in ws[:2]:
            w.grad = torch.ones(2)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    values = [w.detach().clone() for w in ws]
    with pytest.raises(ValueError, match="must be past its first steps, got a RAdam before step 1, which"):
        rescale_(optimizer, ws[1:3], 2.0)
    assert str(optimizer.state_dict()) == str(before)
    assert all(torch.equal(w, value) for w, value in zip(ws, values, strict=True))
    assert len(rescale_(optimizer, ws[1:2], 2.0)) == 1
