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
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


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


# ------------------------------------------------------------------------------------------------------- convolutions


@case
def batchnorm_cnn_without_bias() -> Case:
    """Each filter is in front of its own BatchNorm channel. Gains and shifts act on the function."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *head(8),
    )  # fmt: skip
    return Case(net, images(), cross_entropy, {"0.weight": "neuron", "3.weight": "neuron"})


@case
def batchnorm_cnn_with_bias() -> Case:
    """The mean takes the conv bias away: it is inert, and filters are invariant without it."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron", "0.bias": "inert"})


@case
def batchnorm_after_relu() -> Case:
    """ReLU is homogeneous, but with a bias inside it the filter only moves along with that bias."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron+bias"})


@case
def groupnorm_cnn() -> Case:
    """3 groups of 2 channels share a variance; their biases differ, so they stay after the mean and must go along."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "block:2+bias"})


@case
def groupnorm_cnn_without_bias() -> Case:
    """2 groups of 4 channels: blocks of 4 rows."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), *head(8))
    return Case(net, images(), cross_entropy, {"0.weight": "block:4"})


@case
def instance_norm_cnn() -> Case:
    """InstanceNorm is GroupNorm of one channel: rows, and the constant bias vanishes in the mean over space."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron", "0.bias": "inert"})


@case
def depthwise_separable() -> Case:
    """MobileNet: pointwise, depthwise and pointwise convolutions, each in front of a BatchNorm, with ReLU6 after it."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), *head(4),
    )  # fmt: skip
    return Case(net, images(), cross_entropy, {f"{i}.weight": "neuron" for i in (0, 3, 6)})


@case
def transposed_convolution() -> Case:
    """Its output channels, which BatchNorm normalizes, are dimension 1."""
    net = nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron", "0.bias": "inert"})


@case
def transposed_convolution_in_groups() -> Case:
    """2 groups: output channel (g, o) is made of rows of group g and column o only."""
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    return Case(net, images(4), cross_entropy, {"0.weight": "neuron"})


class PreActivationBlock(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual block."""
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


@case
def preactivation_resnet() -> Case:
    """conv1 feeds only bn2. Stem and conv2 add up in the stream, which is invariant in them only together."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        PreActivationBlock(6),
        PreActivationBlock(6),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        *head(6),
    )
    return Case(net, images(), cross_entropy, {"1.conv1.weight": "neuron", "2.conv1.weight": "neuron"})


class PostNormBlock(nn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual block."""
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


@case
def resnet_with_zero_gammas() -> Case:
    """The last gain of the branch starts at zero, which hides the whole branch at that point, but not elsewhere."""
    block = PostNormBlock(6)
    nn.init.zeros_(block.bn2.weight)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), block, *head(6))
    return Case(net, images(), cross_entropy, dict.fromkeys(("0.weight", "3.conv1.weight", "3.conv2.weight"), "neuron"))


@case
def frozen_batchnorm() -> Case:
    """In eval mode BatchNorm is an affine map by constants: nothing is invariant behind it."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    net[1].eval()
    return Case(net, images(), cross_entropy, {})


@case
def activation_checkpointing() -> Case:
    """Recomputing the block in the backward pass changes nothing about what is invariant."""
    inner = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.GroupNorm(3, 6), nn.ReLU())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = inner, nn.Sequential(*head(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.inner, x, use_reentrant=False))

    return Case(Checkpointed(), images(), cross_entropy, {"inner.0.weight": "block:2"})


# --------------------------------------------------------------------------------------------- reparametrized weights


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


# ------------------------------------------------------------------------------------------------- layer-wise scales


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


# -------------------------------------------------------------------------------------------- attention and recurrence


class Attention(nn.Module):
    """Fused qkv of 2 heads of width 4, with a normalization of queries and keys per head, or without."""

    def __init__(self, qk_norm: bool, bias: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=bias), nn.Linear(8, 8, bias=bias)
        self.q_norm = nn.RMSNorm(4) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(4) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with its norms before ("pre"), after the sum ("post"), or around the branch ("sandwich")."""

    def __init__(self, place: str, qk_norm: bool = False, zero: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.attention = Attention(qk_norm, bias)
        self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=bias)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.after1 = nn.LayerNorm(8) if place == "sandwich" else nn.Identity()
        self.after2 = nn.LayerNorm(8) if place == "sandwich" else nn.Identity()
        self.place = place
        if zero:
            nn.init.zeros_(self.attention.out.weight)
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then a gated feed-forward layer."""
        if self.place == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.after1(self.attention(self.norm1(x)))
        return x + self.after2(self.down(F.gelu(self.up(self.norm2(x)))))


class LanguageModel(nn.Module):
    """Word and place embeddings, blocks, a final norm if they need one, and a head, tied or not."""

    def __init__(self, place: str, tied: bool = False, **kwargs: bool) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(11, 8), nn.Parameter(0.1 * torch.randn(7, 8))
        self.blocks = nn.Sequential(Block(place, **kwargs), Block(place, **kwargs))
        self.norm = nn.LayerNorm(8) if place != "post" else nn.Identity()
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next word."""
        return self.head(self.norm(self.blocks(self.embedding(x) + self.place)))


@case
def pre_norm_transformer() -> Case:
    """Every branch adds to a stream of fixed size; q scales against k, v against out, and GELU is not homogeneous."""
    return Case(LanguageModel("pre"), words(), cross_entropy, {})


@case
def post_norm_transformer() -> Case:
    """Every branch is added to its input before the norm.

    The key's bias only shifts all scores of a query: rows 8 to 16 of qkv's bias are inert, the others are not, so the
    vector as a whole is none.
    """
    return Case(LanguageModel("post", bias=True), words(), cross_entropy, {})


@case
def pre_norm_transformer_with_zero_branches() -> Case:
    """At the start the branches put out nothing, and the embedding looks invariant. It is not, once they wake up."""
    return Case(LanguageModel("pre", zero=True), words(), cross_entropy, {})


@case
def tied_language_model() -> Case:
    """The embedding is also the head, so scaling it scales the logits."""
    return Case(LanguageModel("pre", tied=True), words(), cross_entropy, {})


@case
def qk_norm_attention() -> Case:
    """Each head of q and of k is normalized by itself: blocks of 4 in the rows 0 to 16 of qkv. v is not."""
    labels = {f"blocks.{i}.attention.qkv.weight": "block:4[0:16]" for i in range(2)}
    return Case(LanguageModel("pre", qk_norm=True), words(), cross_entropy, labels)


@case
def qk_norm_attention_with_bias() -> Case:
    """The bias of q and k is inside of the norm, so it goes along."""
    labels = {f"blocks.{i}.attention.qkv.weight": "block:4[0:16]+bias" for i in range(2)}
    return Case(LanguageModel("pre", qk_norm=True, bias=True), words(), cross_entropy, labels)


@case
def sandwich_norm() -> Case:
    """The branch is normalized before it is added: out and down are layers.

    v passes through linearly: rows 16 to 24, one block, because the heads meet in out before the norm.
    """
    labels = {}
    for i in range(2):
        labels |= {f"blocks.{i}.attention.out.weight": "layer", f"blocks.{i}.down.weight": "layer"}
        labels |= {f"blocks.{i}.attention.qkv.weight": "block:8[16:24]"}
    return Case(LanguageModel("sandwich"), words(), cross_entropy, labels)


class NormalizedLSTM(nn.Module):
    """LSTM cell with one LayerNorm for the input's and one for the state's contribution to the gates."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.state = nn.Linear(6, 16, bias=False), nn.Linear(4, 16, bias=False)
        self.norm_input, self.norm_state, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits after the last step."""
        h = c = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            i, f, g, o = (self.norm_input(self.input(step)) + self.norm_state(self.state(h))).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


@case
def lstm_with_layernorm() -> Case:
    """Both matrices are layers in front of their own norm."""
    batch = (torch.randn(4, 5, 6), torch.arange(4) % 3)
    return Case(NormalizedLSTM(), batch, cross_entropy, {"input.weight": "layer", "state.weight": "layer"})


@case
def lstm_before_layernorm() -> Case:
    """Torch's LSTM squashes by tanh, which is not homogeneous, whatever normalizes its output."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.norm, self.head = nn.LSTM(6, 4, batch_first=True), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.lstm(x)[0][:, -1]))

    return Case(Recurrent(), (torch.randn(4, 5, 6), torch.arange(4) % 3), cross_entropy, {})


# ------------------------------------------------------------------------------------------------------- special cases


@case
def mlp_without_norm() -> Case:
    """ReLU layers only rescale against each other."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return Case(net, vectors(), cross_entropy, {})


@case
def unused_and_frozen() -> Case:
    """What the loss never sees is inert; what is not trained is not tested."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.norm = nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3)
            self.unused, self.frozen = nn.Linear(6, 3), nn.Linear(6, 6, bias=False).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.used(self.frozen(x)))

    labels = {"used.weight": "neuron", "unused.weight": "inert", "unused.bias": "inert"}
    return Case(Partly(), vectors(), cross_entropy, labels)


@case
def straight_through() -> Case:
    """The forward pass rounds, the backward pass does not: the gradient is not the loss's, nor at a right angle."""

    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight.abs().amax().detach() / 3
            rounded = (self.weight / scale).round() * scale
            return F.linear(x, self.weight + (rounded - self.weight).detach())

    net = nn.Sequential(Rounded(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return Case(net, vectors(), cross_entropy, {})


@case
def l2_inside_the_loss() -> Case:
    """A penalty on the norm is part of this loss, which therefore changes with the norm."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch) + 1e-2 * sum(p.square().sum() for p in module.parameters())

    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return Case(net, vectors(), loss, {})


@case
def casts_inside() -> Case:
    """A norm that computes in float32, and an inner autocast to bfloat16, are the same maths."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gain, self.last = nn.Linear(6, 5, bias=False), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.first(x).float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.last(self.gain * x)

    return Case(Narrow(), vectors(), cross_entropy, {"first.weight": "layer"})
