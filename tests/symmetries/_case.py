"""Architectures with labels by hand. Each comment says why, from the definition alone.

Labels are written ``kind``, ``block:k``, ``column``, ``layer``; ``[a:b,...]`` after it is what is covered; ``+bias``
that the bias goes along. Parameters that are not mentioned are "none".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Case(NamedTuple):
    """A module, a batch, its loss, and the label of each parameter that is not "none"."""

    module: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]
    labels: dict[str, str]


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Register an architecture under the name of the function that builds it."""
    CASES[build.__name__] = build
    return build


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of the logits, over the last dimension."""
    x, y = batch
    logits = module(x)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def images(channels: int = 3, size: int = 8, n: int = 4) -> tuple[Tensor, Tensor]:
    """A batch of images with labels."""
    return torch.randn(n, channels, size, size), torch.arange(n) % 3


def vectors(features: int = 6, n: int = 8) -> tuple[Tensor, Tensor]:
    """A batch of vectors with labels."""
    return torch.randn(n, features), torch.arange(n) % 3


def words(length: int = 7, n: int = 3, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    """Sequences of words, and the words to be predicted."""
    return torch.randint(1, vocabulary, (n, length)), torch.randint(0, vocabulary, (n, length))


def head(width: int) -> list[nn.Module]:
    """Average pooling and a linear classifier; nothing normalizes what it puts out, so it is none."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
