"""How models are labelled whose scaling symmetries were reasoned by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def told(kind: str, exponents: str) -> tuple[str, frozenset[tuple[str, int]]]:
    """A symmetry as it is written in the labels: ``"pair", "q k^-1"``, where ``1+q`` is a gain with its 1."""
    powers = (word.partition("^") for word in exponents.split())
    return kind, frozenset((name.replace("1+", "1 + "), int(power or 1)) for name, _, power in powers)


def within(prefix: str, exponents: str) -> str:
    """The same with a prefix before each name."""
    return " ".join(prefix + word for word in exponents.split())


def log_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy with labels in turn: it has no scale of its own."""
    logits = model(batch).flatten(0, -2)
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


class Labelled:
    """A model, a batch for it, and what is expected: symmetries, and tensors that do not reach the loss."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *labels: tuple[str, str],
        inert: str = "",
        loss: Callable[[nn.Module, Any], Tensor] = log_loss,
    ) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.basis = {told(*label) for label in labels}
        self.inert = tuple(inert.split())


CASES: dict[str, Callable[[], Labelled]] = {}


def case(build: Callable[[], Labelled]) -> Callable[[], Labelled]:
    """Register a model under the name of the function that builds it."""
    CASES[build.__name__] = build
    return build


def vectors() -> Tensor:
    """Six samples of five numbers."""
    return torch.randn(6, 5)
