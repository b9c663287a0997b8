"""Reparametrized weights, and norms of whole layers, labelled by hand as `_case` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.symmetries._case import Case, case, cross_entropy, head, images, vectors, words


@case
def weight_norm() -> Case:
    """The direction is divided by its norm, row by row. The gain is the norm, so it acts on the function."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))
    return Case(net, vectors(), cross_entropy, {"0.parametrizations.weight.original1": "neuron"})


class StandardizedConv2d(nn.Conv2d):
    """Convolution with rows of mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias)


@case
def weight_standardization() -> Case:
    """Each row is standardized by itself, so it is invariant although a GroupNorm with larger groups follows."""
    net = nn.Sequential(StandardizedConv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron"})


@case
def spectral_norm() -> Case:
    """The weight is divided by its largest singular value, or by the estimate uᵀWv: the whole tensor, not rows."""
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))
    return Case(net, vectors(), cross_entropy, {"0.parametrizations.weight.original": "layer"})


@case
def linear_layernorm() -> Case:
    """One variance over all outputs: the whole tensor, and the bias along."""
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    return Case(net, vectors(), cross_entropy, {"0.weight": "layer+bias"})


@case
def linear_rmsnorm() -> Case:
    """As LayerNorm; here without a bias."""
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.RMSNorm(5), nn.Tanh(), nn.Linear(5, 3))
    return Case(net, vectors(), cross_entropy, {"0.weight": "layer"})


@case
def relu6_before_layernorm() -> Case:
    """ReLU6 clips at 6: invariant as long as nothing is that large, so not invariant."""
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU6(), nn.LayerNorm(5), nn.Linear(5, 3))
    return Case(net, vectors(), cross_entropy, {})


@case
def relu_before_layernorm() -> Case:
    """ReLU does not clip: scaling passes through it."""
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3))
    return Case(net, vectors(), cross_entropy, {"0.weight": "layer"})


@case
def deep_linear_before_layernorm() -> Case:
    """A product of matrices scales with each factor: both are invariant as layers."""
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 3))
    return Case(net, vectors(), cross_entropy, {"0.weight": "layer", "1.weight": "layer"})


@case
def embedding_layernorm() -> Case:
    """Each word's vector is normalized by itself: rows."""
    net = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 11))
    return Case(net, words(), cross_entropy, {"0.weight": "neuron"})


@case
def embedding_with_padding() -> Case:
    """The pad word's vector enters the mean like any other, so only the whole table is invariant."""
    net = nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.Flatten(), nn.LayerNorm(42), nn.Linear(42, 3))
    x = torch.randint(0, 11, (4, 7))
    x[:, -2:] = 0
    nn.init.normal_(net[0].weight)
    return Case(net, (x, torch.arange(4) % 3), cross_entropy, {"0.weight": "layer"})


@case
def two_embeddings_layernorm() -> Case:
    """Words and positions are added before they are normalized: only together."""

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.place = nn.Embedding(11, 6), nn.Embedding(7, 6)
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.word(x) + self.place.weight))

    return Case(Embedded(), words(), cross_entropy, {})


@case
def cosine_loss() -> Case:
    """Each vector of the projection is divided by its norm in the loss: the whole last layer, with its bias."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        a, b = module(batch[0]), module(batch[0].roll(1, 0))
        return -F.cosine_similarity(a, b).exp().mean()

    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return Case(net, vectors(), loss, {"2.weight": "layer+bias"})


@case
def cosine_classifier() -> Case:
    """Features and class vectors are normalized: rows of the classifier; the layer before it as a whole."""

    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classes = nn.Linear(6, 5, bias=False), nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return 5 * F.normalize(self.body(x), dim=1) @ F.normalize(self.classes, dim=1).T

    return Case(Cosine(), vectors(), cross_entropy, {"body.weight": "layer", "classes": "neuron"})


@case
def normalized_columns() -> Case:
    """A custom layer of weight (in, out), divided by the norms of its columns."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ F.normalize(self.kernel, dim=0)

    return Case(Columns(), vectors(), cross_entropy, {"kernel": "column"})


@case
def normalized_third_dimension() -> Case:
    """A bank of maps (in, out, bank), in which each member of the bank is divided by its norm."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Parameter(torch.randn(6, 3, 4))

        def forward(self, x: Tensor) -> Tensor:
            maps = self.maps / self.maps.norm(dim=(0, 1), keepdim=True)
            return torch.einsum("ni,iok->nok", x, maps).tanh().sum(2)

    return Case(Bank(), vectors(), cross_entropy, {"maps": "dim"})
