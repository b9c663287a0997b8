"""What the probe costs: calls of the loss, and memory for a table that is much larger than the samples need."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_normreg import find_scale_invariance, find_symmetries
from lightning_normreg.demos import DemoConvNet
from tests.symmetries import _small_models
from tests.symmetries._labels import label

# Four draws, the certificate's base and two rescalings, and the eps shares with and without eps.
CALLS = 4 + 3 + 2


def loss(module, batch):
    """Cross entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


def test_the_loss_is_called_nine_times():
    """Each call is a forward pass, and all but three go backward, however many layers there are."""
    calls = []

    def counted(module, batch):
        calls.append(len(batch[1]))
        return loss(module, batch)

    find_scale_invariance(DemoConvNet(), (torch.rand(4, 1, 8, 8), torch.arange(4)), forward=counted)
    assert calls == [4] * CALLS


@pytest.mark.parametrize("kind", ["LLAMA", "GPT"])
def test_symmetries_cost_no_more_in_deep_models(kind):
    """Units and symmetries together call the loss at most 60 times, as often in four layers as in eight.

    Symmetries: one call for the order of use, one at the own weights, three for the proof, and the points.
    """
    counts = []
    for depth in (4, 8):
        calls = []

        def counted(module, batch, calls=calls):
            calls.append(1)
            return _small_models.log_loss(module, batch)

        model, batch = _small_models.transformer(getattr(_small_models, kind), depth)()
        find_scale_invariance(model.train(), batch, forward=counted, progress=False)
        before = len(calls)
        found = find_symmetries(model, batch, forward=counted, progress=False)
        assert len(calls) - before == found.passes + 5
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 60


class Words(nn.Module):
    """Mean of normalized word vectors, and a classifier."""

    def __init__(self, rows, dim=32, padding_idx=None) -> None:
        super().__init__()
        self.words = nn.Embedding(rows, dim, padding_idx=padding_idx)
        self.norm, self.last = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, ids):
        """Logits."""
        return self.last(self.norm(self.words(ids)).tanh().mean(1))


class Made(TorchDispatchMode):
    """Sums the bytes of all storages that operators make, other than those of a module."""

    def __init__(self, module) -> None:
        super().__init__()
        self._own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._made: dict[int, int] = {}

    @property
    def size(self):
        """Bytes, of storages at different addresses; where an address is used again, the largest."""
        return sum(self._made.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self._own:
                    self._made[storage.data_ptr()] = max(storage.nbytes(), self._made.get(storage.data_ptr(), 0))
        return result


def words(rows, seed=0):
    """Four sentences of eight words, and their classes."""
    ids = torch.randint(2, rows, (4, 8), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(4)


def test_a_table_of_a_million_rows_is_not_copied():
    """Everything that was ever made, were it all kept, is less than a tenth of the table."""
    rows = 1_000_000
    net = Words(rows)
    with Made(net) as memory:
        verdicts = find_scale_invariance(net, words(rows), forward=loss)
    assert verdicts["words.weight"].kind == "neuron"
    assert memory.size < 0.1 * rows * 32 * 4


@pytest.mark.parametrize("padding_idx", [None, 3, 79_999])
def test_a_large_table_gets_the_verdict_of_a_small_one(padding_idx):
    """With a vocabulary that the samples reach nearly all of, nothing is left out, and nothing is different."""
    torch.manual_seed(0)
    large, small = Words(80_000, padding_idx=padding_idx), Words(40, padding_idx=padding_idx and 3)
    found = find_scale_invariance(large, words(80_000), forward=loss)
    expected = find_scale_invariance(small, words(40), forward=loss)
    assert {name: label(v) for name, v in found.items()} == {name: label(v) for name, v in expected.items()}


def test_a_table_that_the_loss_uses_otherwise_is_asked_as_a_whole():
    """As the last layer too: the logits need all rows, so the small table fails and the large one is taken."""

    class Tied(Words):
        def forward(self, ids):
            return self.norm(self.words(ids).mean(1)) @ self.words.weight.T

    net = Tied(50_000, 20)
    verdicts = find_scale_invariance(net, (words(50_000)[0], torch.tensor([9, 49_999, 7, 5])), forward=loss)
    assert verdicts["words.weight"].kind == "none"
    assert verdicts["words.weight"].z is not None


def test_pairs_of_rows_are_units_of_the_whole_table():
    """Blocks of neighbouring rows have other numbers in a small table, so they are looked for in the large one."""

    class Pairs(Words):
        def forward(self, ids):
            half = torch.stack([self.words(ids), self.words(ids + 1)], -1)
            return self.last(F.normalize(half, dim=(1, 2, 3))[..., 0].tanh().mean(1))

    net = Pairs(33_000)
    ids = 2 * (words(16_000)[0].reshape(-1)[:4, None])
    verdict = find_scale_invariance(net, (ids, torch.arange(4)), forward=loss)["words.weight"]
    assert verdict.kind == "block"
    assert verdict.slices is None or verdict.slices[0][1] > 1000
