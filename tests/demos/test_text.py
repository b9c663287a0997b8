"""The text against Python's own, read in another way."""

from __future__ import annotations

import sys
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor

from lightning_normreg.demos import TextDataModule


def data(context: int = 64, seed: int = 0) -> TextDataModule:
    """Set up."""
    made = TextDataModule(context=context, seed=seed)
    made.setup("fit")
    return made


def decoded(tokens: Tensor) -> str:
    """Characters of tokens in order."""
    return "".join(chr(token + 31) if token else "\n" for token in tokens.flatten().tolist())


@pytest.mark.parametrize("context", [1, 64, 100])
def test_targets_are_inputs_shifted_by_one(context: int) -> None:
    """Within a sequence, and from one to the next, in both sets."""
    made = data(context)
    for loader in (made.train_set, made.val_set):
        x, y = loader.tensors
        assert x.shape == y.shape == (len(loader), context)
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])


def test_both_sets_are_apart_in_the_text() -> None:
    """The first begins it and has nine tenths, the second ends it, and starts after the last target of the first.

    What does not fill a sequence is left out: fewer than ``context + 1`` characters of each.
    """
    text = "\n".join(topics.values())
    shown = "".join("\n" if c < " " else c if c <= "~" else "?" for c in text)
    made = data()
    train, val = (decoded(part.tensors[0]) for part in (made.train_set, made.val_set))
    assert shown.startswith(train)
    assert len(train) == pytest.approx(0.9 * len(text), abs=66)
    start = shown.index(val, len(train) + 1)
    assert start + len(val) >= len(text) - 65


def test_seeds_set_the_order_of_the_batches_alone() -> None:
    """The same for the same seed, another for another; the sets are the same."""
    first, again, other = data(), data(), data(seed=1)
    batches = [next(iter(made.train_dataloader()))[0] for made in (first, again, other)]
    assert batches[0].shape == (32, 64)
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    assert torch.equal(first.train_set.tensors[0], other.train_set.tensors[0])
    assert [len(x) for x, _ in first.val_dataloader()] == [len(first.val_set)]


@pytest.mark.parametrize("context", [0, -1, 10**8])
def test_a_context_that_does_not_fit(context: int) -> None:
    """It is named."""
    with pytest.raises(ValueError, match=rf"`context` must be at least 1 and shorter than the \d+ .*, got {context}\."):
        data(context)


def test_a_python_without_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match=r"pydoc_data\.topics, the text of TextDataModule.*apt install"):
        data()
